"""The rules of imports hold, and an import that breaks one is seen in whatever form it comes."""

from pathlib import Path

import pytest

from .floors import importers, violations
from .test_repository import ROOT, floors

CLEAN = {
    "__init__.py": "from .low import f\nfrom ._lazy import load\n",
    "_lazy.py": "import importlib\n\ndef load(name):\n    return importlib.import_module(name)\n",
    "_validate.py": "",
    "low.py": "import torch\nfrom ._validate import check\n",
    "twin.py": "",
    "high.py": "import moe_ref.low\nfrom .pack import one\nfrom .pack.two import f\n",
    "pack/__init__.py": "from . import one\nfrom ..low import f\n",
    "pack/one.py": "from .. import low\nfrom .two import f\n",
    "pack/two.py": "def f():\n    from moe_ref import _validate\n",
    "course/__init__.py": "from .._lazy import load\n",
    "course/lesson.py": "from moe_ref import Experts\nfrom ..high import f\n",
    "course/text/words.py": "from ... import high\nfrom .. import lesson\n",
}
FLOORS = {"low.py": 0, "twin.py": 0, "pack/one.py": 1, "pack/two.py": 1, "high.py": 2}
FLOORS |= {"course/lesson.py": "beside", "course/text/words.py": "beside"}
FLOORS |= {"_lazy.py": "under", "_validate.py": "under"}


def plant(root: Path, file: str = "low.py", code: str = "") -> Path:
    """A small package that keeps the rules, but for some code at the end of one file."""
    for name, text in CLEAN.items():
        path = root / "moe_ref" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + code if name == file else text)
    return root


def test_a_module_imports_only_from_floors_below_its_own():
    assert violations(ROOT, floors()) == []


def test_only_the_figures_of_the_course_import_matplotlib():
    found = importers(ROOT, "matplotlib")
    assert found
    assert all(name.startswith("moe_ref.course.figures.") for name in found)


def test_a_package_that_keeps_the_rules_breaks_none(tmp_path):
    assert violations(plant(tmp_path), FLOORS) == []


@pytest.mark.parametrize(
    "code",
    [
        "import moe_ref.high",
        "import os, moe_ref.high as h",
        "from moe_ref import high",
        "from moe_ref import high as h",
        "from moe_ref.high import f",
        "from . import low as t, high",
        "from .high import f",
        "from .high import *",
        "import importlib\nimportlib.import_module('moe_ref.high')",
        "import importlib as i\ni.import_module(name='moe_ref.high')",
        "from importlib import import_module\nimport_module('.high', __package__)",
        "from importlib import import_module as load\nload('moe_ref.high')",
        "__import__('moe_ref.high')",
        "def f():\n    from . import high",
        "class A:\n    def f(self):\n        import moe_ref.high",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .high import F",
        "try:\n    from .high import f\nexcept ImportError:\n    f = None",
    ],
)
def test_an_import_from_above_is_seen_in_every_form(code, tmp_path):
    found = violations(plant(tmp_path, "twin.py", code), FLOORS)
    assert "twin.py imports high.py" in found
    assert all(line.startswith("twin.py") for line in found)


@pytest.mark.parametrize(
    ("file", "code", "found"),
    [
        ("low.py", "from .twin import f", "low.py imports twin.py"),
        ("low.py", "from .pack.one import f", "low.py imports pack/one.py"),
        ("low.py", "from . import pack", "low.py imports pack/"),
        ("low.py", "import moe_ref", "low.py imports /"),
        ("low.py", "from . import f", "low.py imports /"),
        ("low.py", "from moe_ref import Experts", "low.py imports /"),
        ("low.py", "from .course import lesson", "low.py imports course/lesson.py"),
        ("low.py", "from . import course", "low.py imports course/"),
        ("high.py", "from .course.text.words import f", "high.py imports course/text/words.py"),
        (
            "high.py",
            "import importlib\nimportlib.import_module(f)",
            "high.py imports a module whose",
        ),
        ("pack/one.py", "from ..high import f", "pack/one.py imports high.py"),
        ("pack/one.py", "from .. import high", "pack/one.py imports high.py"),
        ("pack/one.py", "from ..course import lesson", "pack/one.py imports course/lesson.py"),
        ("pack/__init__.py", "def f():\n    from .. import high", "pack/ imports high.py"),
        ("_validate.py", "from .low import f", "_validate.py imports low.py"),
        ("_validate.py", "from . import course", "_validate.py imports course/"),
        ("__init__.py", "from .course import lesson", "/ imports course/lesson.py"),
        ("pack/two.py", "from .one import f", "a circle: moe_ref.pack.one -> moe_ref.pack.two"),
        ("pack/two.py", "from . import f", "a circle: "),
        ("_validate.py", "from . import _lazy\nfrom ._validate import f", "a circle: "),
        ("course/lesson.py", "from .text import words", "a circle: "),
    ],
)
def test_what_breaks_a_rule_is_named(file, code, found, tmp_path):
    lines = violations(plant(tmp_path, file, code), FLOORS)
    assert any(line.startswith(found) for line in lines), lines


@pytest.mark.parametrize(
    "code",
    [
        "import matplotlib",
        "import matplotlib.pyplot as plt",
        "from matplotlib import pyplot",
        "def f():\n    from matplotlib.axes import Axes",
        "__import__('matplotlib.pyplot')",
    ],
)
def test_an_import_of_matplotlib_is_seen_in_every_form(code, tmp_path):
    assert importers(plant(tmp_path, "course/lesson.py", code), "matplotlib") == {
        "moe_ref.course.lesson"
    }
