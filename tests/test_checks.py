"""Specifications against closed forms; each exercise check accepts what is right, and only that."""

import re
from pathlib import Path

import nbformat
import pytest
import torch

from moe_ref import checks

from .checks import beyond_language, layer, specialisation, training


# ----------------------------------------------------------------------------- specifications
def test_activations_are_those_of_their_definitions_at_known_points():
    one = torch.tensor(1.0)
    assert checks.gelu(one).item() == pytest.approx(0.8413447, abs=1e-6)  # the normal cdf at 1
    assert checks.silu(one).item() == pytest.approx(0.7310586, abs=1e-6)  # 1 / (1 + 1/e)
    assert checks.relu(torch.tensor([-1.0, 0.0, 2.0])).tolist() == [0, 0, 2]


def test_route_gives_the_worked_token_its_experts_and_weights():
    scores = torch.tensor([0.05, 0.61, 0.09, 0.25])
    pairs = checks.route(scores.log(), torch.eye(4), k=2)
    assert [expert for expert, _ in pairs] == [1, 3]
    assert [weight.item() for _, weight in pairs] == pytest.approx([0.61 / 0.86, 0.25 / 0.86])
    raw = checks.route(scores.log(), torch.eye(4), k=1, renormalize=False)
    assert [(expert, weight.item()) for expert, weight in raw] == [(1, pytest.approx(0.61))]


def test_largest_gives_ties_to_the_lower_index():
    assert checks.largest([1.0, 3.0, 3.0, 2.0, 3.0], 4) == [1, 2, 4, 3]


def test_a_layer_of_identical_experts_is_the_dense_block_whatever_the_router():
    torch.manual_seed(0)
    x, into, down = torch.randn(5, 4), torch.randn(6, 4), torch.randn(4, 3)
    y = checks.moe(x, torch.randn(7, 4), into.expand(7, 6, 4), down.expand(7, 4, 3), k=3)
    dense = torch.stack([checks.feed_forward(token, into, down) for token in x])
    torch.testing.assert_close(y, dense)


# ----------------------------------------------------------------------------- exercise checks
ANSWERS = layer.ANSWERS | training.ANSWERS | specialisation.ANSWERS | beyond_language.ANSWERS
WRONG = [(name, answer) for name, (_, wrong) in ANSWERS.items() for answer in wrong]


@pytest.mark.parametrize("name", ANSWERS)
def test_right_answer_passes(name, capsys):
    getattr(checks, name)(ANSWERS[name][0])
    assert f"{ANSWERS[name][0].__name__}: passed (" in capsys.readouterr().out


@pytest.mark.parametrize("name", ANSWERS)
def test_stub_is_not_attempted(name, capsys):
    def stub(*args, **kwargs):
        raise NotImplementedError

    getattr(checks, name)(stub)
    assert capsys.readouterr().out == "stub: not attempted yet\n"


@pytest.mark.parametrize(("name", "answer"), WRONG, ids=lambda part: getattr(part, "__name__", ""))
def test_wrong_answer_is_rejected(name, answer):
    with pytest.raises(AssertionError) as caught:
        getattr(checks, name)(answer)
    message = str(caught.value)
    assert message.startswith(f"{answer.__name__} differs from the specification on this input:\n")
    assert "expected " in message and "got " in message
    assert len(message) < 600  # small enough to be read


@pytest.mark.parametrize("name", ANSWERS)
def test_no_answer_is_rejected(name):
    with pytest.raises(AssertionError, match="got None"):
        getattr(checks, name)(lambda *args, **kwargs: None)


def test_every_exercise_of_the_course_is_tested_here():
    asked = set()
    for path in Path(__file__).parents[1].glob("notebooks/*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if "exercise" in cell.metadata.get("tags", []):
                asked |= set(re.findall(r"^checks\.(\w+)\(", cell.source, re.MULTILINE))
    assert asked == set(ANSWERS)


def test_a_plain_number_is_an_answer_as_well(capsys):
    checks.mutual_information(specialisation.mutual_information_as_a_plain_number)
    assert "passed (" in capsys.readouterr().out


def test_a_check_leaves_the_random_numbers_of_the_lesson_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    checks.swiglu(ANSWERS["swiglu"][0])
    assert torch.rand(3).equal(expected)


def test_a_check_shows_the_case_even_if_the_answer_writes_into_its_input():
    def careless(logits, k, renormalize):
        logits.zero_()
        return ANSWERS["top_k_routing"][0](logits, k, renormalize)

    with pytest.raises(AssertionError) as caught:
        checks.top_k_routing(careless)
    assert "logits = [0.0" not in str(caught.value)
