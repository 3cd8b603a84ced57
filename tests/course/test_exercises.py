"""Each exercise check accepts what is right, and only that."""

import re
from pathlib import Path

import nbformat
import pytest
import torch

from moe_ref.course import exercises

from ..answers import nb00, nb01, nb02, nb03, nb04, nb05, nb06, nb07, nb08, nb09

NOTEBOOKS = [nb00, nb01, nb02, nb03, nb04, nb05, nb06, nb07, nb08, nb09]
ANSWERS = {name: answers for notebook in NOTEBOOKS for name, answers in notebook.ANSWERS.items()}
WRONG = [(name, answer) for name, (_, wrong) in ANSWERS.items() for answer in wrong]


@pytest.mark.parametrize("name", ANSWERS)
def test_right_answer_passes(name, capsys):
    getattr(exercises, name)(ANSWERS[name][0])
    assert f"{ANSWERS[name][0].__name__}: passed (" in capsys.readouterr().out


@pytest.mark.parametrize("name", ANSWERS)
def test_stub_is_not_attempted(name, capsys):
    def stub(*args, **kwargs):
        raise NotImplementedError

    getattr(exercises, name)(stub)
    assert capsys.readouterr().out == "stub: not attempted yet\n"


@pytest.mark.parametrize(("name", "answer"), WRONG, ids=lambda part: getattr(part, "__name__", ""))
def test_wrong_answer_is_rejected(name, answer):
    with pytest.raises(AssertionError) as caught:
        getattr(exercises, name)(answer)
    message = str(caught.value)
    assert message.startswith(f"{answer.__name__} differs from the specification on this input:\n")
    assert "expected " in message and "got " in message
    assert len(message) < 600  # small enough to be read


@pytest.mark.parametrize("name", ANSWERS)
def test_no_answer_is_rejected(name):
    with pytest.raises(AssertionError, match="got None"):
        getattr(exercises, name)(lambda *args, **kwargs: None)


def test_every_exercise_of_the_course_is_tested_here():
    asked = set()
    for path in Path(__file__).parents[2].glob("notebooks/*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if "exercise" in cell.metadata.get("tags", []):
                asked |= set(re.findall(r"^exercises\.(\w+)\(", cell.source, re.MULTILINE))
    assert asked == set(ANSWERS)


def test_a_plain_number_is_an_answer_as_well(capsys):
    exercises.mutual_information(nb08.mutual_information_as_a_plain_number)
    assert "passed (" in capsys.readouterr().out


def test_a_check_leaves_the_random_numbers_of_the_lesson_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    exercises.swiglu(ANSWERS["swiglu"][0])
    assert torch.rand(3).equal(expected)


def test_a_check_shows_the_case_even_if_the_answer_writes_into_its_input():
    def careless(logits, k, renormalize):
        logits.zero_()
        return ANSWERS["top_k_routing"][0](logits, k, renormalize)

    with pytest.raises(AssertionError) as caught:
        exercises.top_k_routing(careless)
    assert "logits = [0.0" not in str(caught.value)
