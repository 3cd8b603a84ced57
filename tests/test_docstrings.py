"""Every public module, class and function says what it is, and every example in it is true."""

import ast
import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import moe_ref

from .floors import modules
from .test_repository import ROOT

MODULES = modules(ROOT)
Named = ast.ClassDef | ast.FunctionDef


def definitions(tree: ast.Module, name: str) -> Iterator[tuple[str, ast.Module | Named]]:
    """A module, and its classes, functions and methods, by their full names."""
    yield name, tree
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Named):
            yield from definitions(node, f"{name}.{node.name}")


def is_overload(node: ast.Module | Named) -> bool:
    return "overload" in {ast.unparse(name) for name in getattr(node, "decorator_list", ())}


def undescribed(tree: ast.Module, name: str) -> list[str]:
    """The public module, classes and functions without a docstring.

    Methods need none, nor do the further signatures of a function, which are overloads.
    """
    own = [(name, tree)] + [(n.name, n) for n in tree.body if isinstance(n, Named)]
    own = [(n, node) for n, node in own if not is_overload(node)]
    return [n for n, node in own if not n.startswith("_") and not ast.get_docstring(node)]


def failures(tree: ast.Module, name: str, scope: dict, path: Path) -> tuple[list[str], int]:
    """What went wrong in the examples of all docstrings, and how many examples there are.

    They are taken from the source, since a function that is checked at run time is another object,
    which doctest would take for one of another module.
    """
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for named, node in definitions(tree, name):
        text = ast.get_docstring(node) or ""
        line = node.body[0].lineno - 1 if text else 0
        torch.manual_seed(0)
        test = doctest.DocTestParser().get_doctest(text, dict(scope), named, str(path), line)
        runner.run(test, out=said.append)
    return said, runner.tries


@pytest.mark.parametrize("name", MODULES)
def test_every_public_module_class_and_function_has_a_docstring(name):
    assert undescribed(ast.parse(MODULES[name].read_text(encoding="utf-8")), name) == []


# Shown at work in the example of another: protocols, inner parts, and the specification's record.
SHOWN_ELSEWHERE = {"BatchLike", "Decision", "Family", "GroupedLinear", "GroupedWeightGrad"}
SHOWN_ELSEWHERE |= {"KVCache", "Shelf", "Step", "WeightedSum"}


def without_example(tree: ast.Module) -> set[str]:
    """The public classes whose docstring has no example."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    public = [node for node in classes if not node.name.startswith("_")]
    return {node.name for node in public if ">>>" not in (ast.get_docstring(node) or "")}


@pytest.mark.parametrize("name", [name for name in MODULES if ".course" not in name])
def test_every_public_class_of_the_library_has_an_example(name):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    assert without_example(tree) <= SHOWN_ELSEWHERE


@pytest.mark.parametrize("name", MODULES)
def test_every_example_in_a_docstring_gives_what_it_shows(name):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    scope = {"torch": torch} | {front: getattr(moe_ref, front) for front in moe_ref.__all__}
    scope |= vars(importlib.import_module(name))
    said, _ = failures(tree, name, scope, MODULES[name])
    assert not said, "".join(said)


PLANTED = '''"""A module.

>>> torch.rand(1).item() == first
True
"""

class Box:
    """A class.

    >>> Box().twice(2)
    4
    """

    def twice(self, x):
        """A method.

        >>> torch.rand(1).item() == first
        True
        >>> 2 * 2
        5
        """
        return 2 * x

    @property
    def size(self):
        """A property.

        >>> Box().size
        3
        """
        return 2

def bare(): ...

def _private(): ...
'''


def test_examples_of_modules_classes_methods_and_properties_are_run_from_the_same_seed():
    torch.manual_seed(0)
    scope = {"torch": torch, "first": torch.rand(1).item()}
    exec(PLANTED, scope)
    tree = ast.parse(PLANTED)
    said, tries = failures(tree, "planted", scope, Path("planted.py"))
    assert tries == 5
    assert len(said) == 2
    assert "line 19, in planted.Box.twice" in said[0] and "Expected:\n    5\nGot:\n    4" in said[0]
    assert "in planted.Box.size" in said[1]


def test_what_has_no_docstring_is_named():
    tree = ast.parse(PLANTED)
    assert undescribed(tree, "planted") == ["bare"]
    assert undescribed(ast.parse("x = 1"), "planted") == ["planted"]
