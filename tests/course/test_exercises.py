"""Each exercise check accepts what is right, and only that."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import torch

from moe_ref.course import exercises

from ..test_notebook_exercises import kind

ROOT = Path(__file__).parents[2]
NOTEBOOKS = [path.stem[:2] for path in sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))]
# For each exercise the right answer and wrong ones: functions, or to predict, guesses. The right
# guess is a function without arguments that computes it.
ANSWERS = {
    name: answers
    for number in NOTEBOOKS
    for name, answers in importlib.import_module(f"tests.answers.nb{number}").ANSWERS.items()
}
PREDICTED = [name for name, (_, wrong) in ANSWERS.items() if not isinstance(wrong[0], Callable)]
WRITTEN = [name for name in ANSWERS if name not in PREDICTED]
WRONG = [(name, i) for name in ANSWERS for i in range(len(ANSWERS[name][1]))]


def verdict(name: str, answer: object, capsys) -> str:
    """What the reader is told, whether it is raised or printed."""
    try:
        getattr(exercises, name)(answer)
    except AssertionError as wrong:
        return str(wrong)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ANSWERS)
def test_the_right_answer_passes(name, capsys):
    right = ANSWERS[name][0]
    if name in WRITTEN:
        assert re.match(rf"{right.__name__}: passed \(\d+ cases\)", verdict(name, right, capsys))
    else:
        assert verdict(name, right(), capsys).startswith("right: ")


@pytest.mark.parametrize("name", ANSWERS)
def test_nothing_is_not_attempted(name, capsys):
    def stub(*args, **kwargs):
        raise NotImplementedError

    nothing = stub if name in WRITTEN else None
    assert "not attempted yet" in verdict(name, nothing, capsys)


@pytest.mark.parametrize(("name", "i"), WRONG)
def test_a_wrong_answer_is_rejected_with_the_reason(name, i, capsys):
    answer = ANSWERS[name][1][i]
    message = verdict(name, answer, capsys)
    if name in PREDICTED:
        assert re.match(r"not right: .+ is (too high|too low|wrong)", message)
        return
    reason = message.removeprefix(f"{answer.__name__}: ").removeprefix("not mended yet: ")
    assert reason != message
    assert not re.match("passed|differs from the specification", reason), (
        "give the case that catches it a rule, or the check rules of the answer"
    )
    assert "\non this input:\n  " in message
    assert len(message) < 1200  # small enough to be read


@pytest.mark.parametrize("name", ANSWERS)
def test_three_wrong_answers_are_tried(name):
    assert len(ANSWERS[name][1]) >= 3


@pytest.mark.parametrize("name", WRITTEN)
def test_no_answer_is_rejected(name, capsys):
    message = verdict(name, lambda *args, **kwargs: None, capsys)
    assert "returns None: is there a return in it?" in message


def asked() -> dict[str, dict[str, str]]:
    """For each notebook the names of its exercises, and the kind of each."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if "exercise" in cell.metadata.get("tags", []):
                (name,) = re.findall(r"^exercises\.(\w+)\(", cell.source, re.MULTILINE)
                found.setdefault(path.stem, {})[name] = kind(cell.source)
    return found


def test_every_exercise_of_the_course_is_tested_here():
    names = [name for exercises in asked().values() for name in exercises]
    assert sorted(names) == sorted(ANSWERS)


def test_every_notebook_has_two_kinds_and_half_of_all_are_not_to_write():
    kinds = {notebook: list(found.values()) for notebook, found in asked().items()}
    one = [notebook for notebook, found in kinds.items() if len(set(found)) < 2]
    assert not one, f"all exercises are of one kind in {one}"
    every = [kind for found in kinds.values() for kind in found]
    assert every.count("write") <= len(every) / 2


def test_a_check_leaves_the_random_numbers_of_the_lesson_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    exercises.expert_counts(ANSWERS["expert_counts"][0])
    assert torch.rand(3).equal(expected)
