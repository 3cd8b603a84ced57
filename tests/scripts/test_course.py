"""Storing a notebook, refusing to, and a learner's copies."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def course():
    spec = importlib.util.spec_from_file_location("course", ROOT / "scripts" / "course.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebook(folder: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "99_sample.ipynb")
    return folder / "99_sample.ipynb"


def outputs(path: Path) -> list[str]:
    cells = nbformat.read(path, as_version=4).cells
    return ["".join(output.text for output in cell.outputs) for cell in cells]


IMPORT = "from moe_ref.course import lesson"


def test_a_notebook_is_stored_on_one_thread_with_nothing_but_its_outputs(course, tmp_path):
    path = notebook(tmp_path, "import torch\nprint(torch.get_num_threads())")
    course.store([path])
    assert outputs(path) == ["1\n"]
    stored = nbformat.read(path, as_version=4)
    assert stored.metadata == {"kernelspec": course.KERNELSPEC, "language_info": course.LANGUAGE}
    assert not stored.cells[0].metadata


def test_a_claim_that_holds_is_stored(course, tmp_path):
    path = notebook(tmp_path, IMPORT, "lesson.claim('one is less than two', 1 < 2)")
    course.store([path], quiet=0)
    assert outputs(path) == ["", "claim: one is less than two: holds\n"]


def test_a_claim_that_does_not_hold_is_named_and_nothing_is_stored(course, tmp_path):
    claims = "lesson.claim('it is fast', True)\nlesson.claim('it is: twice as fast', False)"
    path = notebook(tmp_path, IMPORT, claims)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"these claims did not hold: it is: twice as fast$"):
        course.store([path], quiet=0)
    assert path.read_bytes() == before


def test_a_cell_that_fails_stores_nothing(course, tmp_path):
    path = notebook(tmp_path, "print(1)", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        course.store([path])
    assert path.read_bytes() == before


def test_a_busy_machine_is_refused_where_there_are_claims_and_only_there(course, tmp_path):
    count = "import time\nend = time.time() + 60\nwhile time.time() < end: pass"
    command = [sys.executable, "-c", count]
    busy = [subprocess.Popen(command) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        with_claim = notebook(tmp_path, IMPORT, "lesson.claim('it is fast', True)")
        before = with_claim.read_bytes()
        with pytest.raises(SystemExit, match=r"machine is busy: .* got \d+% of it \(90% needed"):
            course.store([with_claim])
        assert with_claim.read_bytes() == before
        without = notebook(tmp_path, "print(1)")
        course.store([without])
        assert outputs(without) == ["1\n"]
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_the_pins_count_what_a_notebook_could_lose(course, tmp_path):
    figure = "import matplotlib.pyplot as plt\nplt.figure(figsize=(3, 2), dpi=100)\nplt.plot([1])"
    more = "assert 1\nlesson.compare('x', 1, 1)\nlesson.claim('x', 1)"
    path = notebook(tmp_path, IMPORT, more, figure + "\nplt.show()")
    course.store([path], quiet=0)
    found = course.pins(path)
    assert found.pop("least_bytes") > 1000
    assert 0.5 < found["least_width"] / 300 < 1.5
    assert 0.5 < found["least_height"] / 200 < 1.5
    del found["least_width"], found["least_height"]
    assert found == {"asserts": 1, "compares": 1, "claims": 1, "not_compared": 0, "images": 1}


def test_a_learners_copy_is_never_written_over(course, tmp_path, capsys):
    lab = tmp_path / "lab"
    course.lab(reset=False, folder=lab)
    names = sorted(path.name for path in lab.iterdir())
    assert names == [*(path.name for path in course.find([])), "glossary.md"]
    (lab / names[0]).write_text("my work")
    (lab / names[1]).unlink()
    course.lab(reset=False, folder=lab)
    assert (lab / names[0]).read_text() == "my work"
    assert (lab / names[1]).exists()
    assert f"1 copied, {len(names) - 1} left as they were" in capsys.readouterr().out


def test_a_reset_moves_the_work_aside_and_copies_afresh(course, tmp_path, capsys):
    lab = tmp_path / "lab"
    course.lab(reset=True, folder=lab)
    first = next(iter(course.find([])))
    (lab / first.name).write_text("my work")
    course.lab(reset=True, folder=lab)
    assert (lab / first.name).read_bytes() == first.read_bytes()
    (aside,) = tmp_path.glob("lab-*")
    assert (aside / first.name).read_text() == "my work"
    assert f"your work is in {aside.name}/ now" in capsys.readouterr().out
