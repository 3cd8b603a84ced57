"""What each module of the package imports, and which imports break the rules of the house.

A floor is a number, "under" (may be imported by all) or "beside" (the course). A module imports
from floors below its own and from those under all; within a package also from the package itself.
Only the course imports what stands beside, nobody imports the front of the package, and imports
never run in a circle. Imports inside functions and for type checkers count like any other.
"""

import ast
import importlib.util
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

FRONT = "moe_ref"
UNKNOWN = "a module whose name only a run can tell"
Floors = dict[str, int | str]


def modules(root: Path) -> dict[str, Path]:
    """The files of the package in `root`, by the names of their modules."""
    files = sorted((root / FRONT).rglob("*.py"))
    names = (".".join(path.relative_to(root).with_suffix("").parts) for path in files)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, files, strict=True)}


def imported(name: str, path: Path) -> Iterator[str]:
    """The full name of all that a file imports, in whatever form."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    loaders = {"import_module", "__import__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, package)
            yield from (f"{base}.{alias.name}" for alias in node.names)
            loaders |= {a.asname for a in node.names if a.asname and a.name == "import_module"}
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node) in loaders:
            given = [*node.args, *(word.value for word in node.keywords if word.arg == "name")]
            if given and isinstance(given[0], ast.Constant):
                yield importlib.util.resolve_name(given[0].value, package)
            else:
                yield UNKNOWN


def called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def graph(root: Path) -> dict[str, set[str]]:
    """For each module of the package, what it imports: modules of the package, others by name."""
    known = modules(root)

    def module(name: str) -> str:  # moe_ref.layer.MoELayer is something in moe_ref.layer
        outer = name
        while outer not in known and "." in outer:
            outer = outer.rpartition(".")[0]
        return outer if outer in known else name

    return {name: {module(n) for n in imported(name, path)} for name, path in known.items()}


def importers(root: Path, package: str) -> set[str]:
    """The modules that import a package from elsewhere."""
    return {
        name for name, names in graph(root).items() if package in {n.split(".")[0] for n in names}
    }


def file_of(name: str, path: Path) -> str:
    """A module as the README's table writes it: `ffn.py`, `kernels/cpu.py`, or `kernels/`."""
    inner = name.removeprefix(FRONT).strip(".").replace(".", "/")
    return inner + ("/" if path.name == "__init__.py" else ".py")


def floor(file: str, floors: Floors) -> int | str:
    """Of a file that the table lists; of a package that it doesn't: the highest one in it."""
    if file in floors:
        return floors[file]
    inside = [value for listed, value in floors.items() if listed.startswith(file)]
    assert inside, f"{file} is on no floor"
    return max(inside, key=str)


def violations(root: Path, floors: Floors) -> list[str]:
    """Every import that breaks a rule, as a sentence."""
    files = {name: file_of(name, path) for name, path in modules(root).items()}
    found, inside = [], {}
    for name, names in graph(root).items():
        inside[name] = names & set(files)
        for other in sorted(names & {UNKNOWN, *files}):
            if not allowed(files[name], files.get(other, UNKNOWN), floors):
                found.append(f"{files[name]} imports {files.get(other, other)}")
    try:
        TopologicalSorter(inside).prepare()
    except CycleError as error:
        found.append("a circle: " + " -> ".join(error.args[1]))
    return found


def allowed(file: str, other: str, floors: Floors) -> bool:
    if file == "/":  # the front
        return other != UNKNOWN and floor(other, floors) != "beside"
    own = floor(file, floors)
    if other == UNKNOWN or own == "beside":
        return own in ("under", "beside")
    theirs = "front" if other == "/" else floor(other, floors)
    if isinstance(own, int) and isinstance(theirs, int):
        package = file.split("/")[0] + "/"
        return theirs < own or other.startswith(package)
    return theirs == "under"
