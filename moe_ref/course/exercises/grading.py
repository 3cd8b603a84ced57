"""How an exercise is graded: small cases first, and the first that goes wrong is shown whole.

`grade` tries a function on cases; the reader wrote it, or mends the one that stands there.
`predict` compares a guess with what the course computes.
"""

import linecache
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..lesson import brief

Case = dict[str, Any] | tuple[str, dict[str, Any]]

_LONGEST = 8  # entries of a row, or rows, that a message shows; of longer ones, the first six


class WrongAnswer(AssertionError):
    """What a check found: its message is the whole story."""


def grade(
    attempt: Callable,
    specification: Callable,
    cases: Iterator[Case],
    *,
    kind: str = "write",
    gradients: Sequence[str] = (),
    own_memory: bool = False,
    rules: Mapping[str, Callable[..., bool]] | None = None,
) -> None:
    """Compare an attempt with the specification on every case, and report the first miss.

    Args:
        attempt: the reader's function; raising NotImplementedError means not attempted.
        specification: the plain function that is right; it never reads a NaN in its input.
        cases: arguments by name, smallest first. A pair ("ties go to the lower expert", arguments)
            names the rule that this case is there for. A NaN marks what nothing may read.
        kind: "write" raises at a miss; "bug", where wrong code stands to be mended, prints it.
        gradients: the arguments whose gradients are compared as well.
        own_memory: whether every entry of the answer must have memory of its own, shared with no
            other entry and no argument.
        rules: for each sentence a test of the answer, `test(given, **case)`. If an answer is wrong,
            the first that fails is named.

    Raises:
        WrongAnswer: names what is wrong and shows the case, the answer expected and that given.
    """
    passed = 0
    with _aside():
        for case in cases:
            rule, arguments = case if isinstance(case, tuple) else ("", case)
            miss = _Trial(attempt, specification, rule, arguments)
            try:
                found = miss.run(gradients, own_memory, rules or {})
            except NotImplementedError:
                print(f"{attempt.__name__}: not attempted yet")
                return
            if found and kind == "bug":
                print(f"{attempt.__name__}: not mended yet: {found}")
                return
            if found:
                raise brief(WrongAnswer(f"{attempt.__name__}: {found}"))
            passed += 1
    print(f"{attempt.__name__}: passed ({passed} cases)")


def predict(guess: Any, truth: Any, tolerance: float, why: str) -> None:
    """Compare a guess with the truth, and explain.

    Args:
        guess: a number, several in order (a curve), a text or a bool; None: not attempted yet.
        truth: what is right, or a function that computes it when there is a guess to compare.
        tolerance: how far a number may be off and still count as right.
        why: the explanation, in a sentence or two.
    """
    if guess is None:
        print("not attempted yet: put your guess in the place of None")
        return
    with _aside():
        truth = _plain(truth() if callable(truth) else truth)
    guess = _plain(guess)
    allowed = f" (within {tolerance:g} counts as right)" if tolerance else ""
    if _form(guess) != _form(truth):
        print(f"not a guess of the right form: {_form(guess)}, where {_form(truth)} is asked")
        return
    off = [_off(g, t, tolerance) for g, t in zip(_flat(guess), _flat(truth), strict=True)]
    verdict = next(filter(None, off), "")
    if not verdict:
        print(f"right: {_show(truth, digits=3)}{allowed}. {why}")
        return
    where = f", first at place {off.index(verdict) + 1}" if len(off) > 1 else ""
    guessed, right = _show(guess, digits=3), _show(truth, digits=3)
    print(f"not right: {guessed} is {verdict}{where}; it is {right}{allowed}. {why}")


def normal(*shape: int) -> Tensor:
    """Standard normal numbers of this shape."""
    return torch.randn(shape)


def tied(*shape: int, levels: int = 2) -> Tensor:
    """Numbers of this shape out of a few, so that most are tied: 0, 1, ... levels - 1."""
    return torch.randint(levels, shape).float()


def distinct(tokens: int, k: int, n_experts: int) -> Tensor:
    """k different experts for each token."""
    return torch.stack([torch.randperm(n_experts)[:k] for _ in range(tokens)])


# ------------------------------------------------------------------------------ one case


class _Trial:
    """One case: what was asked, and what is wrong with the answer."""

    def __init__(self, attempt: Callable, specification: Callable, rule: str, case: dict[str, Any]):
        self.attempt, self.specification, self.rule, self.case = attempt, specification, rule, case

    def run(self, gradients: Sequence[str], own: bool, rules: Mapping[str, Callable]) -> str:
        """Nothing, or what is wrong with this answer and the case that shows it."""
        expected = self.specification(**(wanted := self._arguments(gradients)))
        handed = self._arguments(gradients)
        try:
            given = self.attempt(**handed)
        except NotImplementedError:
            raise
        except Exception as error:
            return self._report(f"raised {type(error).__name__}: {error}{_line(error)}")
        with torch.no_grad():
            if not _agree(given, expected):
                return self._report(self._reason(given, expected, rules), expected, given)
        for name, value in handed.items():
            if not _untouched(value, self.case[name]):
                return self._report(f"it writes into its argument {name}", self.case[name], value)
        if own and (shared := _shared(given, handed)):
            return self._report(shared)
        for name in gradients:
            right, got = _gradient(expected, wanted[name]), _gradient(given, handed[name])
            if not _agree(got, right):
                cut = " (none arrives)" if not got.any() else ""
                return self._report(f"wrong gradient for {name}{cut}", right, got)
        return ""

    def _arguments(self, gradients: Sequence[str]) -> dict[str, Any]:
        """Copies of the arguments, those with gradients as leaves."""
        copies = {name: _copy(value) for name, value in self.case.items()}
        for name in gradients:
            copies[name].requires_grad_()
        return copies

    def _reason(self, given: Any, expected: Any, rules: Mapping[str, Callable]) -> str:
        if given is None:
            return "it returns None: is there a return in it?"
        if _nan(given) and any(_nan(value) for value in self.case.values()):
            return "it reads what it must not: a NaN marks it, and comes out"
        if _form(given) != _form(expected):
            return f"returns {_form(given)} where {_form(expected)} is right"
        for rule, test in rules.items():
            if not test(given, **self.case):
                return f"breaks the rule: {rule}"
        if self.rule:
            return f"breaks the rule: {self.rule}"
        return "differs from the specification"

    def _report(self, what: str, *pair: Any) -> str:
        about = f"\n  (the rule here: {self.rule})" if self.rule and self.rule not in what else ""
        lines = [f"{what}{about}\non this input:"]
        for name, value in self.case.items():
            lines.append(f"  {name} = {_show(value, len(name) + 5)}")
        for word, value in zip(("expected ", "     got "), pair, strict=False):
            lines.append(word + _show(value, len(word)))
        if "..." in lines[-1] and _form(pair[0]) == _form(pair[1]):
            lines += _first_difference(*pair)
        return "\n".join(lines)


def _first_difference(expected: Any, given: Any) -> list[str]:
    if isinstance(expected, tuple):
        pairs = zip(expected, given, strict=True)
        return next(filter(None, (_first_difference(e, g) for e, g in pairs)), [])
    if not isinstance(expected, Tensor) or _agree(given, expected):
        return []
    near = [_agree(g, e) for e, g in zip(expected.flatten(), given.flatten(), strict=True)]
    at = [int(i) for i in torch.unravel_index(torch.tensor(near.index(False)), expected.shape)]
    e, g = (_show(tensor[tuple(at)]) for tensor in (expected, given))
    return [f"they differ first at {at}: expected {e}, got {g}"]


def _line(error: Exception) -> str:
    """The line of the reader's code at which this arose: the outermost that is not ours."""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename != __file__:
            line = linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f"\n  at its line: {line}" if line else ""
    return ""


def _agree(given: Any, expected: Any) -> bool:
    """Same structure and shape, integers equal, real numbers equal to float32 rounding."""
    if isinstance(expected, tuple):
        pair = isinstance(given, tuple | list) and len(given) == len(expected)
        return pair and all(_agree(g, e) for g, e in zip(given, expected, strict=True))
    if not isinstance(expected, Tensor):
        if isinstance(given, Tensor) and given.numel() == 1:
            given = given.item()
        if isinstance(expected, float):
            return isinstance(given, int | float) and math.isclose(given, expected, rel_tol=1e-6)
        return type(given == expected) is bool and given == expected
    if not isinstance(given, Tensor) or given.shape != expected.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(given.double(), expected.double())
    return torch.allclose(given.to(expected), expected, rtol=1e-4, atol=1e-6)


def _form(answer: Any) -> str:
    if isinstance(answer, tuple | list):
        return "(" + ", ".join(map(_form, answer)) + ")"
    if isinstance(answer, Tensor) and answer.dim():
        return f"a tensor of shape {tuple(answer.shape)}"
    if getattr(answer, "ndim", 1) == 0:  # of torch or numpy
        answer = answer.item()
    words = {int: "a number", float: "a number", bool: "True or False", str: "a text"}
    return words.get(type(answer), type(answer).__name__)


def _gradient(answer: Any, leaf: Tensor) -> Tensor:
    """Of a sum that weighs every number of the answer differently; zeros where none arrives."""
    chance = torch.Generator().manual_seed(1)
    loss = 0 * leaf.detach().nan_to_num().sum()
    for part in answer if isinstance(answer, tuple | list) else (answer,):
        if isinstance(part, Tensor) and part.requires_grad:
            loss = loss + (part * torch.randn(part.shape, generator=chance)).sum()
    if not loss.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(loss, leaf, retain_graph=True, materialize_grads=True)[0]


def _untouched(value: Any, original: Any) -> bool:
    if not isinstance(original, Tensor):
        return True
    return torch.equal(value.detach().nan_to_num(), original.nan_to_num())


def _shared(answer: Any, handed: Mapping[str, Any]) -> str:
    """Whether a write into one entry of the answer would show elsewhere, and where."""
    argument = {
        place: n for n, v in handed.items() if isinstance(v, Tensor) for place in _places(v)
    }
    seen: set[tuple[int, int]] = set()
    for part in answer if isinstance(answer, tuple | list) else (answer,):
        places = _places(part)
        if seen & set(places) or len(set(places)) < len(places):
            return "entries of the answer share memory: a write into one changes others"
        if common := argument.keys() & set(places):
            name = argument[common.pop()]
            return f"the answer shares memory with {name}: a write into one changes the other"
        seen |= set(places)
    return ""


def _places(tensor: Tensor) -> list[tuple[int, int]]:
    """Where in memory each entry lies."""
    memory = tensor.untyped_storage()
    all_of_it = torch.arange(memory.nbytes() // tensor.element_size())
    own = all_of_it.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return [(memory.data_ptr(), place) for place in own.flatten().tolist()]


# ------------------------------------------------------------------------------ small tools


@contextmanager
def _aside() -> Iterator[None]:
    """On the CPU whatever the lesson's device, and without touching its random numbers."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _nan(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_nan, value))
    if isinstance(value, Tensor):
        return bool(value.isnan().any())
    return isinstance(value, float) and math.isnan(value)


def _show(value: Any, indent: int = 0, digits: int = 4) -> str:
    """In its shape, rounded; what is longer than a reader would read is cut."""
    if isinstance(value, Tensor):
        cut = any(size > _LONGEST for size in value.shape)
        shape = f" shape {tuple(value.shape)}" if cut or not value.numel() else ""
        return _nested(value.tolist(), indent, digits) + shape
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_show(part, indent, digits) for part in value) + ")"
    return f"{value:.{digits}g}" if isinstance(value, float) else repr(value)


def _nested(value: Any, indent: int, digits: int) -> str:
    if not isinstance(value, list):
        return repr(round(value, digits)) if isinstance(value, float) else repr(value)
    parts = [_nested(part, indent + 1, digits) for part in value[:_LONGEST]]
    if len(value) > _LONGEST:
        parts[6:] = ["..."]
    rows = bool(value) and isinstance(value[0], list)
    return "[" + (",\n" + " " * (indent + 1) if rows else ", ").join(parts) + "]"


def _plain(value: Any) -> Any:
    """Tensors and arrays as numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _off(guess: Any, truth: Any, tolerance: float) -> str:
    if isinstance(truth, str | bool):
        return "" if guess == truth else "wrong"
    if abs(guess - truth) <= tolerance + 1e-9 * abs(truth):
        return ""
    return "too low" if guess < truth else "too high"
