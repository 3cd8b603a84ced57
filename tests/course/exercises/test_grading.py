"""How a check speaks: of a right answer, a wrong one, one that raises, and a guess."""

import math
import subprocess
import sys

import pytest
import torch

from moe_ref.course.exercises.grading import WrongAnswer, grade, predict, tied


def cases():
    yield "one token", {"x": torch.tensor([[1.0, 2.0]]), "w": torch.tensor([3.0, -1.0])}
    yield {"x": torch.tensor([[1.0, math.nan], [2.0, 3.0]]), "w": torch.tensor([2.0, 0.0])}


def weighted(x, w):
    """Columns of weight 0 are not read."""
    return sum((x[:, i] * w[i] for i in w.nonzero().flatten().tolist()), torch.zeros(len(x)))


def told(attempt, **options):
    with pytest.raises(WrongAnswer) as caught:
        grade(attempt, weighted, cases(), **options)
    return str(caught.value)


def test_a_right_answer_passes_every_case(capsys):
    grade(weighted, weighted, cases(), gradients=("x", "w"), own_memory=True)
    assert capsys.readouterr().out == "weighted: passed (2 cases)\n"


def test_a_wrong_answer_is_shown_the_first_case_in_its_shape_and_the_rule_it_breaks():
    def total(x, w):
        return x.sum(1)

    assert told(total).splitlines() == [
        "total: breaks the rule: one token",
        "on this input:",
        "  x = [[1.0, 2.0]]",
        "  w = [3.0, -1.0]",
        "expected [1.0]",
        "     got [3.0]",
    ]


def test_a_rule_of_the_answer_is_named_before_the_rule_of_the_case():
    def total(x, w):
        return x.sum(1)

    rules = {"finite": lambda given, x, w: True, "below 2": lambda given, x, w: given.max() < 2}
    assert told(total, rules=rules).startswith("total: breaks the rule: below 2\n")


def test_an_error_in_the_code_is_shown_with_its_line_and_the_case():
    def careless(x, w):
        return x @ w[:1]

    lines = told(careless).splitlines()
    assert lines[0].startswith("careless: raised RuntimeError: ")
    assert "  at its line: return x @ w[:1]" in lines
    assert "  (the rule here: one token)" in lines
    assert "  x = [[1.0, 2.0]]" in lines


def test_reading_what_must_not_be_read_is_noticed():
    def dense(x, w):
        return (x * w).sum(1)

    assert told(dense).startswith("dense: it reads what it must not: a NaN marks it")


def test_a_gradient_that_is_wrong_or_missing_is_noticed():
    def detached(x, w):
        return weighted(x, w.detach())

    def doubled(x, w):
        y = weighted(x, w)
        return 2 * y - y.detach()

    grade(detached, weighted, cases())
    assert told(detached, gradients=("x", "w")).startswith(
        "detached: wrong gradient for w (none arrives)\n"
    )
    assert told(doubled, gradients=("x",)).startswith("doubled: wrong gradient for x\n")


def test_shared_memory_is_noticed():
    def copies(x, n):
        return torch.stack([x] * n)

    def views(x, n):
        return x.expand(n, -1)

    def alias(x, n):
        return x[None] if n == 1 else copies(x, n)

    def parts(x, n):
        one = x.clone()
        return tuple(one for _ in range(n))

    def check(attempt, specification, n):
        grade(attempt, specification, iter([{"x": torch.ones(2), "n": n}]), own_memory=True)

    check(copies, copies, 3)
    with pytest.raises(WrongAnswer, match="entries of the answer share memory"):
        check(views, copies, 3)
    with pytest.raises(WrongAnswer, match="the answer shares memory with x"):
        check(alias, copies, 1)
    with pytest.raises(WrongAnswer, match="entries of the answer share memory"):
        check(parts, lambda x, n: (x,) * n, 2)


def test_writing_into_an_argument_is_noticed_and_the_case_is_shown_as_it_was():
    def scribble(x, w):
        y = weighted(x, w)
        x[:, 0] = 7
        return y

    lines = told(scribble).splitlines()
    assert lines[0] == "scribble: it writes into its argument x"
    assert "  x = [[1.0, 2.0]]" in lines
    assert lines[-1] == "     got [[7.0, 2.0]]"


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (torch.ones(1, 1), r"returns a tensor of shape \(1, 1\) where a tensor of shape \(1,\) is"),
        (1.0, r"returns a number where a tensor of shape \(1,\) is right"),
        ("1", "returns a text where"),
        ([torch.ones(1)], r"returns \(a tensor of shape \(1,\)\) where"),
        (None, "returns None: is there a return in it?"),
    ],
)
def test_a_wrong_form_is_named(answer, what):
    with pytest.raises(WrongAnswer, match=what):
        grade(lambda x, w: answer, weighted, cases())


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        (2.7, 2, False),
        (2.0, 2, True),
        (torch.tensor(2), 2, True),
        (torch.tensor(1.0), 1.0, True),
        (torch.tensor([2.7]), torch.tensor([2]), False),
        (torch.tensor([2.0]), torch.tensor([2]), True),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0]), False),
        ([1, 2.0], (1, 2.0), True),
        (1.0 + 1e-8, 1.0, True),
        (1.001, 1.0, False),
    ],
)
def test_integers_are_equal_and_real_numbers_close(given, expected, same):
    def check():
        grade(lambda n: given, lambda n: expected, iter([{"n": 1}]))

    if same:
        check()
    else:
        with pytest.raises(WrongAnswer):
            check()


def test_a_long_answer_is_cut_and_the_first_difference_is_named():
    def off(x):
        y = x.clone()
        y[7, 40] += 1
        return y

    with pytest.raises(WrongAnswer) as caught:
        grade(off, lambda x: x, iter([{"x": torch.zeros(9, 64)}]))
    message = str(caught.value)
    assert "shape (9, 64)" in message
    assert message.endswith("they differ first at [7, 40]: expected 0.0, got 1.0")
    assert len(message) < 1200


def test_a_bug_that_still_stands_is_printed_and_raises_nothing(capsys):
    def total(x, w):
        return x.sum(1)

    grade(total, weighted, cases(), kind="bug")
    assert capsys.readouterr().out.startswith("total: not mended yet: breaks the rule: one token\n")
    grade(weighted, weighted, cases(), kind="bug")
    assert capsys.readouterr().out == "weighted: passed (2 cases)\n"


@pytest.mark.parametrize(
    ("guess", "truth", "printed"),
    [
        (None, 0.5, "not attempted yet: put your guess in the place of None"),
        (0.54, 0.5, "right: 0.5 (within 0.05 counts as right). Because."),
        (
            0.56,
            0.5,
            "not right: 0.56 is too high; it is 0.5 (within 0.05 counts as right). Because.",
        ),
        (0.44, lambda: torch.tensor(0.5), "not right: 0.44 is too low; it is 0.5 (within"),
        ([1, 2], torch.tensor([1.0, 2.5]), "not right: (1, 2) is too low, first at place 2; it is"),
        ([1, 2, 3], [1, 2], "not a guess of the right form"),
        ("many", 0.5, "not a guess of the right form: a text, where a number is asked"),
        ("dense", "moe", "not right: 'dense' is wrong; it is 'moe'"),
        (True, True, "right: True"),
    ],
)
def test_a_guess_is_compared_and_explained(guess, truth, printed, capsys):
    predict(guess, truth, 0.05, "Because.")
    assert capsys.readouterr().out.startswith(printed)


def test_nothing_is_computed_for_a_guess_that_was_not_made(capsys):
    predict(None, lambda: pytest.fail("computed"), 0.1, "Because.")
    assert capsys.readouterr().out.startswith("not attempted yet")


def test_tied_numbers_are_of_a_few_values():
    assert tied(64, 2, levels=3).unique().tolist() == [0.0, 1.0, 2.0]


def test_jupyter_shows_the_message_without_a_traceback():
    code = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "shell.run_cell('from moe_ref.course import exercises')\n"
        "shell.run_cell('exercises.expert_counts(lambda experts, n_experts: experts)')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown = (run.stdout + run.stderr).splitlines()
    assert shown[0].startswith("WrongAnswer: <lambda>: returns a tensor of shape")
    assert "on this input:" in shown
    assert not any("Traceback" in line or "grading.py" in line for line in shown)
    assert len(shown) < 12
