"""The pictures stored in the notebooks, and what none of them may lose unnoticed."""

import base64
import importlib.util
import io
import re

import numpy as np
from nbformat import NotebookNode
from PIL import Image

from .pins import COLUMNS, PINS
from .test_notebooks import PATHS, ROOT, code_cells, each, each_of_the_course, hygiene, prose


def figures_of(cells: list[NotebookNode]) -> list[dict]:
    """The data of every output that has a picture."""
    data = (output.get("data", {}) for cell in cells for output in cell.outputs)
    return [forms for forms in data if "image/png" in forms]


@hygiene
@each
def test_every_figure_says_in_words_what_it_shows(name):
    """nbval compares this text, and a screen reader reads it: a title, and below it the data."""
    for figure in figures_of(code_cells(name)):
        title, *data = figure.get("text/plain", "").splitlines()
        assert title.startswith("Figure: "), f"not drawn by figures: {title}"
        assert len(title.split()) >= 4, figure["text/plain"]
        assert any(line.strip() for line in data), f"no data below the title: {title}"


@hygiene
@each
def test_no_picture_is_blank(name):
    for figure in figures_of(code_cells(name)):
        image = Image.open(io.BytesIO(base64.b64decode(figure["image/png"]))).convert("RGB")
        pixels = np.asarray(image).reshape(-1, 3)
        inked = (pixels != pixels[0]).any(1).mean()
        assert inked > 0.01, figure["text/plain"]
        assert len(np.unique(pixels, axis=0)) > 16, figure["text/plain"]


@hygiene
@each
def test_a_notebook_lost_no_assert_no_picture_and_no_comparison_of_outputs(name):
    """If it was meant: python scripts/course.py pins > tests/pins.py"""
    spec = importlib.util.spec_from_file_location("course", ROOT / "scripts" / "course.py")
    course = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(course)
    found = course.pins(PATHS[name])
    assert tuple(found) == COLUMNS
    for column, pinned in zip(COLUMNS, PINS[name], strict=True):
        if column.startswith("least_"):
            assert found[column] >= 0.8 * pinned, f"{column}: {found[column]} against {pinned}"
        else:
            assert found[column] == pinned, f"{column}: {found[column]} against {pinned}"


@hygiene
def test_only_notebooks_that_exist_are_pinned():
    assert list(PINS) == list(PATHS)


@hygiene
@each_of_the_course
def test_a_notebook_has_figures_and_a_surprise(name):
    assert figures_of(code_cells(name))
    assert re.search(r"surprise|guess", prose(name), re.IGNORECASE)
