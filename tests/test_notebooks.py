"""The course's notebooks: the form of their files, and what they do with other parameters.

That their cells run and give the stored outputs is tested by nbval, in the same run of pytest.
"""

import ast
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
PATHS = {path.stem: path for path in sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))}
IGNORE = "nbval-ignore-output"

# Two sets of parameters for each notebook; both differ from the defaults and between themselves.
SETTINGS: dict[str, tuple[dict, dict]] = {
    "00_start_here": (
        {"n_experts": 4, "k": 1, "seed": 1, "crowd": 1000},
        {"d_model": 8, "n_experts": 12, "k": 3},
    ),
    "01_dense_ffn": (
        {"d_model": 64, "d_ff": 192, "tokens": 16, "roofline_width": 512, "seed": 1},
        {"d_model": 128, "d_ff": 256, "tokens": 32, "roofline_width": 1024},
    ),
    "02_experts_and_router": (
        {"n_experts": 4, "k": 1, "steps": 40, "runs": 2, "text_tokens": 1000, "seed": 1},
        {"n_experts": 12, "k": 3, "d_ff": 32, "steps": 60, "runs": 3, "tokens": 6},
    ),
    "03_routing_strategies": (
        {"n_experts": 4, "k": 1, "n_groups": 2, "steps": 20, "text_tokens": 2000, "seed": 1},
        {"n_experts": 12, "k": 3, "d_model": 8, "jitter": 0.3, "crowd": 500, "steps": 20},
    ),
    "05_capacity": (
        {"tokens": 400, "n_experts": 4, "k": 1, "seed": 1},
        {"tokens": 600, "popularity": 2.0, "capacity_factor": 1.25, "skew": 1.0, "request": 4},
    ),
    "04_dispatch": (
        {"n_experts": 3, "k": 1, "layer_experts": 4, "tokens": 16, "most_tokens": 256, "seed": 1},
        {"k": 3, "layer_experts": 12, "d_model": 32, "d_ff": 64, "most_tokens": 512},
    ),
    "06_load_balancing": (
        {"n_experts": 4, "k": 1, "steps": 40, "repeats": 1, "seed": 1},
        {"n_experts": 6, "d_model": 32, "d_ff": 16, "steps": 40, "repeats": 2, "pressure": 0.05},
    ),
    "07_train_language_model": (
        {"steps": 20, "d_model": 32, "n_experts": 4, "k": 1, "batch": 8, "seed": 1},
        {"steps": 20, "d_model": 32, "n_layers": 1, "n_experts": 6, "d_ff": 32, "seq": 32},
    ),
    "08_specialisation": (
        {
            "layer": 0,
            "windows": 2,
            "requests": 1,
            "ablation_windows": 1,
            "steps": 20,
            "repeats": 2,
            "seed": 1,
        },
        {
            "layer": 3,
            "windows": 3,
            "requests": 2,
            "ablation_windows": 1,
            "prompt": "grep it",
            "d_model": 32,
            "n_experts": 4,
            "steps": 20,
            "repeats": 2,
        },
    ),
    "09_beyond_language": (
        {"patch": 4, "n_experts": 4, "k": 2, "steps": 20, "task_steps": 20, "seed": 1},
        {"d_model": 16, "d_ff": 8, "steps": 20, "task_experts": 3, "task_steps": 20, "repeats": 2},
    ),
    "10_published_models": (
        {"shrink": 60, "layer": 0, "seed": 1},
        {"model": "mixtral-8x22b", "shrink": 150, "tokens": 8, "layer": 3},
    ),
    "11_dense_or_moe": (
        {"model": "mixtral-8x7b", "n_experts": 4, "k": 1, "most_tokens": 32, "draws": 20},
        {
            "model": "granite-3.1-1b-a400m",
            "d_model": 64,
            "d_ff": 64,
            "most_tokens": 32,
            "draws": 20,
            "seed": 1,
        },
    ),
}

hygiene = pytest.mark.hygiene
each = pytest.mark.parametrize("name", PATHS)
each_of_the_course = pytest.mark.parametrize("name", [n for n in PATHS if not n.startswith("00")])


def read(name: str) -> NotebookNode:
    return nbformat.read(PATHS[name], as_version=nbformat.NO_CONVERT)


def code_cells(name: str) -> list[NotebookNode]:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def prose(name: str) -> str:
    return "\n\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")


def printed(cells: list[NotebookNode]) -> str:
    """All text that these cells show, but for those whose output differs from run to run."""
    outputs = [output for cell in cells if IGNORE not in tags(cell) for output in cell.outputs]
    shown = (o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)
    return "\n".join(text for text in shown if not text.startswith("<Figure"))


def test_the_course_has_notebooks():
    assert PATHS


# --------------------------------------------------------------------------- the form of a file


@hygiene
@each
def test_a_notebook_is_valid_and_says_only_what_every_machine_would(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == {
        "kernelspec": {
            "display_name": "Python 3 (ipykernel)",
            "language": "python",
            "name": "python3",
        },
        "language_info": {
            "file_extension": ".py",
            "mimetype": "text/x-python",
            "name": "python",
            "pygments_lexer": "ipython3",
        },
    }
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


@hygiene
@each
def test_a_cell_carries_no_metadata_but_tags_and_folding(name):
    for cell in read(name).cells:
        assert set(cell.metadata) <= {"tags", "jupyter"}, cell.source
        known = {"parameters", "exercise", "solution", IGNORE, "raises-exception"}
        assert set(tags(cell)) <= known, cell.source


@hygiene
@each
def test_a_notebook_is_stored_executed_in_order_without_an_error(name):
    cells = code_cells(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            if output.output_type == "execute_result":
                assert output.execution_count == cell.execution_count


@hygiene
@each
def test_stored_outputs_hold_nothing_that_changes_from_run_to_run(name):
    for cell in code_cells(name):
        for output in cell.outputs:
            data = output.get("data", {})
            assert "application/vnd.jupyter.widget-view+json" not in data, cell.source
            if IGNORE in tags(cell):
                continue
            assert "image/svg+xml" not in data, cell.source
            assert output.get("name") != "stderr", cell.source
            text = output.get("text") or data.get("text/plain", "") + data.get("text/html", "")
            assert not re.search(r"\b0x[0-9a-f]{6,}|\bit/s\b", text), cell.source


@hygiene
@each
def test_at_most_a_third_of_the_outputs_are_not_compared(name):
    cells = code_cells(name)
    assert sum(IGNORE in tags(cell) for cell in cells) <= len(cells) / 3


@hygiene
@each
def test_code_cells_are_small(name):
    sizes = []
    for cell in code_cells(name):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert 1 <= len(lines) <= 25, cell.source
        assert max(map(len, lines)) <= 88, cell.source
        sizes.append(len(lines))
    assert statistics.median(sizes) <= 5


@hygiene
@each
def test_a_notebook_is_of_readable_length(name):
    assert 40 <= len(read(name).cells) <= 70


@hygiene
@each
def test_a_notebook_opens_with_its_question_and_closes_with_what_to_remember(name):
    first, text = read(name).cells[0], prose(name)
    assert first.cell_type == "markdown"
    assert re.match(rf"# {name[:2]}\b.*\n", first.source)
    for part in ("You will be able to", "You need", "?"):
        assert part in first.source
    assert len(re.findall(r"^[-*] ", first.source, re.MULTILINE)) == 3
    assert re.search(r"\d+ minutes to read", first.source)
    assert re.search(r"\d+ seconds to run", first.source)
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings[-4:] == ["Exercises", "Recap", "In the wild", "Next"]


@hygiene
@each
def test_a_paragraph_begins_with_what_was_found_and_not_with_where(name):
    starts = re.findall(r"^(?:The|This) (?:figure|plot|picture) shows", prose(name), re.MULTILINE)
    assert not starts


@hygiene
@each
def test_what_is_timed_and_claimed_is_not_compared(name):
    for cell in code_cells(name):
        if "lesson.claim(" in cell.source:
            assert IGNORE in tags(cell), cell.source
            assert "claim: " in str(cell.outputs) and "does not hold" not in str(cell.outputs)


@hygiene
@each
def test_images_in_the_text_have_a_description(name):
    for description in re.findall(r"!\[(.*?)\]\(", prose(name)):
        assert len(description.split()) >= 3
    assert "<img" not in prose(name)


@hygiene
@each
def test_links_to_other_files_of_the_course_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose(name)):
        if "://" not in target:
            assert (PATHS[name].parent / target).exists(), target


@hygiene
@each
def test_parameters_are_declared_so_that_people_and_papermill_can_read_them(name):
    parameters, set_up = code_cells(name)[:2]
    assert tags(parameters) == ["parameters"]
    assert not any("parameters" in tags(cell) for cell in code_cells(name)[1:])
    form = r"[a-z]\w*: (int|float|bool|str) = [^#=]+  # [^#=]+"
    for line in parameters.source.splitlines():
        assert re.fullmatch(form, line), line
    for statement in ast.parse(parameters.source).body:
        ast.literal_eval(statement.value)
    found = papermill.inspect_notebook(PATHS[name])
    assert len(found) == len(parameters.source.splitlines())
    assert all(p["help"] and p["inferred_type_name"] != "None" for p in found.values())
    assert {"seed", "device"} <= set(found)
    assert "device = lesson.start(" in set_up.source


@hygiene
@each
def test_every_parameter_is_used(name):
    """`seed` and `device` are used by the set-up cell itself."""
    used = {
        node.id
        for cell in code_cells(name)[1:]
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    assert set(papermill.inspect_notebook(PATHS[name])) - {"seed", "device"} <= used


# --------------------------------------------------------------------------- other parameters


def run_papermill(name: str, folder: Path, parameters: dict) -> subprocess.CompletedProcess[str]:
    """The command that a reader would type, in an empty folder; it writes out.ipynb there."""
    options = [str(word) for item in parameters.items() for word in ("-p", *item)]
    command = [sys.executable, "-m", "papermill", PATHS[name], "out.ipynb", "--no-progress-bar"]
    return subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True)


@each
def test_other_parameters_give_other_results(name, tmp_path):
    assert name in SETTINGS, f"add two sets of parameters for {name} to SETTINGS"
    results = [printed(code_cells(name))]
    for i, parameters in enumerate(SETTINGS[name]):
        folder = tmp_path / str(i)
        folder.mkdir()
        run = run_papermill(name, folder, parameters)
        assert run.returncode == 0, run.stderr
        assert [path.name for path in folder.iterdir()] == ["out.ipynb"], "it left files behind"
        cells = nbformat.read(folder / "out.ipynb", as_version=4).cells
        results.append(printed([cell for cell in cells if cell.cell_type == "code"]))
    assert len(set(results)) == 3


@each
@pytest.mark.parametrize("fault", ["type", "name", "range"])
def test_a_bad_parameter_stops_the_notebook_before_any_work(name, fault, tmp_path):
    declared = papermill.inspect_notebook(PATHS[name])
    number = next(p for p, about in declared.items() if about["inferred_type_name"] == "int")
    parameters, message = {
        "type": ({number: "many"}, f"ValueError: {number}='many' is not an int"),
        "name": (
            {f"{number}_": 1},
            f"ValueError: {number}_ is not a parameter of this notebook: did you mean {number}?",
        ),
        "range": ({number: -1}, f"ValueError: {number}=-1 is less than "),
    }[fault]
    begin = time.perf_counter()
    run = run_papermill(name, tmp_path, parameters)
    assert run.returncode != 0
    assert message in run.stderr
    assert time.perf_counter() - begin < 60
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    cells = [c for c in cells if c.cell_type == "code" and "papermill-error" not in str(tags(c))]
    set_up = next(i for i, cell in enumerate(cells) if "lesson.start(" in cell.source)
    assert not any(cell.outputs or cell.execution_count for cell in cells[set_up + 1 :])


def test_every_setting_is_for_a_notebook_that_exists():
    assert set(SETTINGS) <= set(PATHS)


# --------------------------------------------------------------------------- nbval itself


@pytest.mark.parametrize(("stored", "code"), [("6", 0), ("7", 1)])
def test_a_stored_output_that_is_not_what_the_cell_gives_fails(stored, code, tmp_path):
    """With the options in pyproject.toml, which `make test` uses."""
    cell = nbformat.v4.new_code_cell("print(2 * 3)", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"{stored}\n")]
    path = tmp_path / "sample.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    options = ["-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    command = [sys.executable, "-m", "pytest", *options, path]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == code, run.stdout
    assert "1 passed" in run.stdout if code == 0 else "1 failed" in run.stdout
