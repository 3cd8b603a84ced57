"""What the repository says about itself: set-up, commands, README, and what an install brings."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import moe_ref

from .floors import Floors, file_of, modules

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
CORE = {"torch", "einops", "jaxtyping", "numpy", "safetensors", "tokenizers"}


def requirements(*extras: str) -> list[Requirement]:
    lines = PROJECT["dependencies"] + [
        line for extra in extras for line in PROJECT["optional-dependencies"][extra]
    ]
    return [Requirement(line) for line in lines]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for pin in found:
        assert [s.operator for s in pin.specifier] == ["=="], f"{pin} is no exact pin"
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in found}


def run_python(code: str, *, cwd: Path = ROOT, isolated: bool = False) -> str:
    command = [sys.executable, *(["-I"] if isolated else []), "-c", code]
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


# ------------------------------------------------------------------------------------- set-up


def test_the_library_alone_depends_on_the_core_only():
    assert {r.name for r in requirements()} == CORE


def test_every_dependency_is_pinned_within_its_range():
    pinned = pins()
    for requirement in requirements(*PROJECT["optional-dependencies"]):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} against =={version}"


def test_pins_are_of_public_releases_and_name_each_distribution_once():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(pins()) == sum("==" in line for line in lines if not line.startswith("#"))
    assert not any(Version(version).local for version in pins().values())


def test_conda_users_get_the_same_python_the_same_pins_and_the_same_extras():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "moe_ref"
    python, pip, by_pip = environment["dependencies"]
    name, versions = python.split(" ")
    assert (name, pip) == ("python", "pip")
    supported = Requirement(f"python{PROJECT['requires-python']}").specifier
    assert Requirement(f"python{versions}").specifier == supported
    assert by_pip == {"pip": ["-c constraints.txt", "-e .[course,test]"]}
    assert set(PROJECT["optional-dependencies"]) == {"course", "test"}


def test_the_continuous_integration_runs_what_the_readme_says():
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script[-1] == "make test"
    assert "make test" in README
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert {"run": "make test"} in job["steps"]
    assert job["strategy"]["matrix"] == {
        "os": ["ubuntu-latest", "macos-latest"],
        "python": ["3.11", "3.13"],
    }


def test_commit_hooks_come_from_this_machine_only():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in hooks["repos"]] == ["local"]
    assert all(hook["language"] == "system" for hook in hooks["repos"][0]["hooks"])


# ----------------------------------------------------------------------------------- commands


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text()
    return set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_make_help_lists_every_command():
    run = make("help")
    assert set(re.findall(r"^make ([\w-]+) +\S", run.stdout, re.MULTILINE)) == targets()


def test_every_command_in_the_readme_exists_and_every_command_is_in_it():
    named = re.findall(r"\bmake ([a-z-]+)\b(?= *(?:`|#|$|\w+=))", README, re.MULTILINE)
    assert set(named) == targets()


def test_a_python_that_is_too_old_is_answered_in_one_line(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho Python 3.9.2\nexit 1\n")
    old.chmod(0o755)
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    run = make("setup", f"PYTHON={old}", cwd=tmp_path)
    assert run.returncode != 0
    (line,) = run.stdout.splitlines()
    assert "No Python 3.11 to 3.13 found" in line
    assert "Python 3.9.2" in line
    assert not (tmp_path / ".venv").exists()


def test_an_install_that_fails_leaves_one_line_and_no_stamp(tmp_path):
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")  # has no version
    (tmp_path / "constraints.txt").touch()
    pip = "#!/bin/sh\ncase $* in *venv*) mkdir -p .venv/bin; cp $0 .venv/bin/python;;\n"
    pip += '*pip*) echo "ERROR: No space left on device"; exit 1;; esac\n'
    python = tmp_path / "python3"
    python.write_text(pip)
    python.chmod(0o755)
    run = make("setup", f"PYTHON={python}", cwd=tmp_path)
    assert run.returncode != 0
    assert "pip failed: ERROR: No space left on device" in run.stdout.splitlines()[-1]
    assert not (tmp_path / ".venv" / "installed").exists()


# ------------------------------------------------------------------------------------- README


def rows(heading: str) -> list[list[str]]:
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_table_of_notebooks_is_the_notebooks_that_exist():
    listed = {}
    for number, title, question, minutes, seconds in rows("The notebooks"):
        name, target = re.fullmatch(r"\[(.+)\]\((.+)\)", title).groups()
        listed[target] = (number, name, minutes, seconds)
        assert question.endswith("?")
        assert int(seconds) <= 60
    found = {}
    for path in sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb")):
        first = nbformat.read(path, as_version=4).cells[0].source
        number, title = re.match(r"# (\d\d) · (.+)", first).groups()
        minutes = re.search(r"(\d+) minutes to read", first)[1]
        seconds = re.search(r"(\d+) seconds to run", first)[1]
        found[f"notebooks/{path.name}"] = (number, title, minutes, seconds)
    assert listed == found


def floors() -> Floors:
    """The map of the library: for each file of `moe_ref` its floor, or where else it stands."""
    table = {file.strip("`"): floor for floor, file, _ in rows("The library")}
    return {file: int(floor) if floor.isdigit() else floor for file, floor in table.items()}


def test_the_map_of_the_library_is_the_files_that_exist():
    """A package is on the map by its files, and by itself if it defines something."""
    found = set()
    for name, path in modules(ROOT).items():
        body = ast.parse(path.read_text(encoding="utf-8")).body
        defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in body)
        if path.name != "__init__.py" or defines:
            found.add(file_of(name, path))
    assert set(floors()) == found
    assert {floor for floor in floors().values() if isinstance(floor, str)} == {"under", "beside"}


def test_the_example_in_the_readme_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert run_python(example).startswith("torch.Size([4, 100, 256])\n")


def test_links_in_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


# ------------------------------------------------------------------------------ what is installed

ALONE = """
import sys
from importlib.machinery import PathFinder
class Alone:
    allowed, finders = {packages} | set(sys.stdlib_module_names), list(sys.meta_path)
    find_distributions = staticmethod(PathFinder.find_distributions)
    def find_spec(self, name, path=None, target=None):
        found = self.finders if name.split(".")[0] in self.allowed else []
        return next(filter(None, (f.find_spec(name, path, target) for f in found)), None)
sys.meta_path[:] = [Alone()]
"""


def alone() -> str:
    """Code after which only the core dependencies, and what they depend on, can be imported."""
    wanted, queue = set(), [requirement.name for requirement in requirements()]
    while queue:
        name = canonicalize_name(queue.pop())
        if name not in wanted:
            wanted.add(name)
            needed = map(Requirement, metadata.distribution(name).requires or ())
            queue += [r.name for r in needed if not r.marker or r.marker.evaluate({"extra": ""})]
    packages = {
        package
        for package, names in metadata.packages_distributions().items()
        if wanted & {canonicalize_name(name) for name in names}
    }
    return ALONE.format(packages=packages | {"moe_ref"})


def test_importing_the_library_needs_its_core_dependencies_only():
    code = alone() + (
        "import moe_ref\n"
        "print(sorted({'tokenizers', 'safetensors', 'pandas'} & set(sys.modules)))\n"
        "print([name for name in sys.modules if name.startswith('moe_ref.course')])\n"
        "from moe_ref import checkpoints, generation, telemetry, training\n"
        "from moe_ref.course import corpora, exercises, lesson\n"
        "try:\n"
        "    from moe_ref.course import figures\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error.name)\n"
    )
    assert run_python(code).splitlines() == ["[]", "[]", "matplotlib"]


def test_every_module_is_there_on_first_use_and_in_dir():
    names = {name for name in modules(ROOT) if not re.search(r"\._", name)} - {"moe_ref"}
    parts = {name.split(".")[1] for name in names}
    code = (
        "import sys, moe_ref\n"
        "before = {name for name in sys.modules if name.startswith('moe_ref.')}\n"
        "listed = dir(moe_ref)\n"
        "import types\n"
        "found = [n for n in listed if isinstance(getattr(moe_ref, n), types.ModuleType)]\n"
        "print([name for name in found if not name.startswith('_')])\n"
        "print(sorted(before))\n"
        "print(dir(moe_ref.course))\n"
    )
    listed, before, rooms = map(ast.literal_eval, run_python(code).splitlines())
    assert set(listed) == parts
    at_once = ["capacity", "experts", "ffn", "layer", "model", "routers", "routing"]
    assert {f"moe_ref.{name}" for name in at_once} <= set(before)
    late = {"checkpoints", "course", "generation", "specification", "telemetry", "training"}
    assert not {f"moe_ref.{name}" for name in late} & set(before)
    assert {"corpora", "exercises", "figures", "lesson"} <= set(rooms)


def test_a_name_that_is_no_part_of_the_package_is_named():
    with pytest.raises(AttributeError, match="module 'moe_ref' has no attribute 'kernel_of_truth'"):
        _ = moe_ref.kernel_of_truth
    with pytest.raises(AttributeError, match="has no attribute '__wrapped__'"):
        _ = moe_ref.__wrapped__
    with pytest.raises(ImportError, match="cannot import name 'tables'"):
        from moe_ref.course import tables  # noqa: F401


def test_the_version_is_that_of_the_project_or_unknown():
    assert moe_ref.__version__ == PROJECT["version"]
    code = (
        "from importlib import metadata\n"
        "find = metadata.distribution\n"
        "metadata.distribution = lambda name: find(name if name != 'moe_ref' else 'nothing')\n"
        "import moe_ref; print(moe_ref.__version__)"
    )
    assert run_python(code) == "unknown\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", folder, ROOT], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_the_library_and_the_data_of_the_course_and_imports_from_anywhere(
    wheel, tmp_path
):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {f"moe_ref/{p.relative_to(ROOT / 'moe_ref')}" for p in ROOT.glob("moe_ref/**/*.py")}
    data = {"incidents.txt", "manifest.json", "models.csv", "tokenizer.json"}
    assert names == expected | {"moe_ref/py.typed"} | {f"moe_ref/data/{name}" for name in data}
    assert sum(file.compress_size for file in wheel.infolist()) < 350_000
    wheel.extractall(tmp_path / "site")
    code = alone() + (
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import moe_ref; from moe_ref.course import corpora\n"
        "print(moe_ref.__file__, moe_ref.__version__, corpora.tokenizer().get_vocab_size())\n"
        "print(len(corpora.documents('incidents')), corpora.manifest()['domains'].keys())\n"
        "print('data' in dir(moe_ref))\n"
        "try:\n"
        "    corpora.data_file('tiny-moe')\n"
        "except FileNotFoundError as error:\n"
        "    print(error)\n"
    )
    first, second, third, last = run_python(code, cwd=tmp_path, isolated=True).splitlines()
    file, version, entries = first.split()
    assert Path(file).is_relative_to(tmp_path)
    assert version == PROJECT["version"]
    assert entries == "2048"
    assert second.startswith("2000 ") and third == "False"
    assert "a trained model: clone the repository" in last


# ------------------------------------------------------------------------------------- manners


def own_files() -> Iterator[Path]:
    """What a clone holds: all but what git is told to ignore."""
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    for folder, folders, names in os.walk(ROOT):
        folders[:] = set(folders) - ignored - {".git"}
        yield from (Path(folder, name) for name in names)


def test_no_file_names_a_machine_or_a_package_registry():
    registry = r"--(?:extra-)?index-url|--find-links|//[\w.]*(?:pypi|pythonhosted|anaconda)\."
    # Not after a letter or a digit, as by chance in the base64 of an image.
    machine = rf"(?<![\w+/])(?:{re.escape(str(ROOT))}|/(?:home|root|Users|tmp)/\w)"
    for path in own_files():
        if path == Path(__file__) or path.suffix in {".png", ".safetensors"}:
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(registry, text), path
        if path.parent.name != "data":  # generated shell commands name paths of their own
            assert not re.search(machine, text), path


def test_the_licence_is_there():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"


def test_the_makefile_keeps_authentication_on():
    makefile = (ROOT / "Makefile").read_text()
    assert not re.search(r"token=|password=|--ip", makefile)
