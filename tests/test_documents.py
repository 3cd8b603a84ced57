"""CONTRIBUTING, CHANGELOG and docs/: what they name exists, calls come in the order they tell."""

import ast
import builtins
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import repeat

import pytest
import torch

from moe_ref import Transformer, TransformerConfig, generation, training

from .floors import floor, modules
from .test_repository import ROOT, floors, targets

PATHS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
ARCHITECTURE = TEXTS["docs/architecture.md"]
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in modules(ROOT).items()}
ALL_SOURCES = "\n".join([*SOURCES.values(), *(p.read_text() for p in ROOT.glob("tests/**/*.py"))])
CLASSES = {
    node.name: name
    for name, source in SOURCES.items()
    for node in ast.parse(source).body
    if isinstance(node, ast.ClassDef)
}
FILE = r"[\w./-]*\.(?:py|md|ipynb|toml|yml|txt)|[\w.-]+(?:/[\w.-]+)*/"
each = pytest.mark.parametrize("document", TEXTS)


def quoted(text: str) -> list[str]:
    """What stands between backticks, blocks of code left out."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def section(text: str, heading: str) -> str:
    return re.split(rf"^#+ {re.escape(heading)}\n", text, flags=re.M)[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of the first table."""
    lines = re.search(r"(?:^\|.*\n)+", text + "\n", re.M)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def file_exists(name: str) -> bool:
    """Whether it is in the repository or in moe_ref; NN is any number, and topic any words."""
    pattern = name.rstrip("/").replace("NN", "[0-9][0-9]").replace("topic", "*")
    return any(any(base.glob(pattern)) for base in (ROOT, ROOT / "moe_ref"))


def module_of(name: str) -> str | None:
    """The module of moe_ref, or else of its course, that is called so."""
    tries = (name, f"moe_ref.{name}", f"moe_ref.course.{name}", f"moe_ref.course.text.{name}")
    return next((full for full in tries if full in SOURCES), None)


def exists(name: str) -> bool:
    """Whether a dotted name such as `balance.LOSSES` or `Routing.asked` leads to something."""
    head, *attributes = name.split(".")
    if head in CLASSES:
        thing = getattr(importlib.import_module(CLASSES[head]), head)
    else:
        full = module_of(head)
        while attributes and full and f"{full}.{attributes[0]}" in SOURCES:
            full = f"{full}.{attributes.pop(0)}"
        if full is None and (head in {"moe_ref", "tests"} or not find_spec(head)):
            return False
        thing = importlib.import_module(full or head)
    for attribute in attributes:
        fields = getattr(thing, "__annotations__", {})
        if not hasattr(thing, attribute) and attribute not in fields:
            return False
        thing = getattr(thing, attribute, None)
    return True


def defined(name: str) -> bool:
    """Whether a name exists and is at home there, not only imported from elsewhere."""
    module, _, last = name.rpartition(".")
    if (full := module_of(module)) is None:
        return exists(name)
    tree, found = ast.parse(SOURCES[full]), {full.rpartition(".")[2]}
    for node in tree.body:
        targets = getattr(node, "targets", [getattr(node, "target", node)])
        found |= {getattr(t, "id", getattr(t, "name", "")) for t in targets}
    return last in found or f"{full}.{last}" in SOURCES


def dotted(text: str) -> list[str]:
    """The names among the quotes that have a dot and are no files."""
    names = [re.sub(r"\(.*\)$", "", name) for name in quoted(text)]
    is_name, is_file = re.compile(r"[A-Za-z_]\w*(\.\w+)+"), re.compile(FILE)
    return [name for name in names if is_name.fullmatch(name) and not is_file.fullmatch(name)]


def renamed() -> list[tuple[str, str]]:
    return [(row[0], row[1]) for row in rows(section(TEXTS["CHANGELOG.md"], "Renamed and moved"))]


def current(document: str) -> str:
    """A document without the old names of the changelog."""
    text = TEXTS[document]
    for old, _ in renamed():
        text = text.replace(f"| {old} |", "| |")
    return text


@each
def test_every_file_and_name_in_a_document_exists(document):
    text = current(document)
    files = [name for name in quoted(text) if re.fullmatch(FILE, name)]
    assert [name for name in files if not file_exists(name)] == []
    assert [name for name in dotted(text) if not exists(name)] == []
    words = {name for name in quoted(text) if re.fullmatch(r"[A-Z]\w+", name)}
    unknown = {name for name in words if not re.search(rf"\b{name}\b", ALL_SOURCES)}
    assert {name for name in unknown if not hasattr(builtins, name)} == set()


@each
def test_links_in_a_document_lead_to_files_and_headings(document):
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[document]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        assert (folder / path).exists(), target
        headings = re.findall(r"^#+ (.*)$", (folder / path).read_text(encoding="utf-8"), re.M)
        assert not anchor or anchor in {h.lower().replace(" ", "-") for h in headings}, target


@each
def test_every_command_in_a_document_exists(document):
    assert set(re.findall(r"`make (\w+)`", TEXTS[document])) <= targets()


@pytest.mark.parametrize("old", [name for old, _ in renamed() for name in quoted(old)])
def test_what_the_changelog_calls_renamed_is_gone(old):
    if re.fullmatch(FILE, old):
        assert not file_exists(old)
    else:
        assert not defined(old.removeprefix("python -m "))


def test_the_floors_drawn_are_those_of_the_readme():
    drawing = re.search(r"```text\n( beside.*?)```", ARCHITECTURE, re.DOTALL)[1]
    drawn = {}
    for where, names in re.findall(r"^ *(\d|under|beside) +(.*)$", drawing, re.M):
        for file in re.findall(r"[\w/]+(?:\.py|/)", names):
            drawn[file] = int(where) if where.isdigit() else where
    assert drawn == {file: floor(file, floors()) for file in drawn}
    assert {file.split("/")[0] for file in floors()} == {file.split("/")[0] for file in drawn}


# ------------------------------------------------------------------------------ one token's way


def calls(run: Callable[[], object]) -> list[tuple[str, str]]:
    """Every call of a function of moe_ref during `run`: file and name, in the order they begin."""
    seen, package = [], str(ROOT / "moe_ref") + "/"

    def watch(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package):
            seen.append((code.co_filename.removeprefix(package), code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(before)
    return seen


def tables() -> list[list[tuple[str, str]]]:
    text = section(ARCHITECTURE, "One token's way, from id to loss")
    parts = text.split("In generation")
    return [[(file.strip("`"), name.strip("`")) for file, name, _ in rows(p)] for p in parts]


def model() -> Transformer:
    torch.manual_seed(0)
    options = {"selection_bias": True}
    sizes = dict(n_experts=4, d_shared=8, capacity_factor=1.0, router_options=options)
    return Transformer(TransformerConfig(50, 16, 1, 4, 12, **sizes))


def train() -> None:
    tokens = torch.arange(34).view(2, 17)
    batch = training.Batch(tokens[:, :-1], tokens[:, 1:])
    config = training.TrainingConfig(steps=1, bias_rate=0.01)
    training.train(model(), lambda start: repeat(batch), config, progress=False)


def generate() -> None:
    generation.generate(model(), torch.tensor([[3, 1, 4]]), 1)


def first_missing(told: list[tuple[str, str]], seen: list[tuple[str, str]]) -> Iterator:
    """What is told, from the first call on that was not seen after those told before it."""
    rest = iter(seen)
    return (call for call in told if call not in rest)


@pytest.mark.parametrize(("number", "run"), [(0, train), (1, generate)])
def test_a_token_takes_the_way_that_is_told(number, run):
    assert next(first_missing(tables()[number], calls(run)), None) is None


def test_a_way_told_in_another_order_is_noticed():
    told, seen = tables()[0], calls(train)
    swapped = [*told[:17], told[18], told[17], *told[19:]]
    assert next(first_missing(swapped, seen)) == told[17]


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("dispatch.plan", True),
        ("dispatch.plam", False),
        ("Routing.asked", True),
        ("Routing.load", False),
        ("checkpoints.mixtral.layout", True),
        ("moe_ref.course.text.incidents", True),
        ("moe_ref.nowhere", False),
        ("nowhere.at_all", False),
    ],
)
def test_a_name_with_an_error_in_it_is_noticed(name, there):
    assert exists(name) == there
