"""How an exercise is graded: small cases first, and the first that goes wrong is shown whole."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def grade(attempt: Callable, specification: Callable, cases: Iterator[dict[str, Any]]) -> None:
    """Compare on every case, smallest first; raise an AssertionError that shows the first miss."""
    passed = 0
    # On the CPU whatever the lesson's device, and without touching the lesson's random numbers.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for case in cases:
            expected = specification(**case)
            try:
                given = attempt(**{name: _copy(value) for name, value in case.items()})
            except NotImplementedError:
                print(f"{attempt.__name__}: not attempted yet")
                return
            if not _agree(given, expected):
                raise AssertionError(_counterexample(attempt.__name__, case, given, expected))
            passed += 1
    print(f"{attempt.__name__}: passed ({passed} cases)")


def _agree(given: Any, expected: Any) -> bool:
    """Same structure and shape, integers equal, real numbers equal to float32 rounding."""
    if isinstance(expected, tuple):
        pair = isinstance(given, tuple | list) and len(given) == len(expected)
        return pair and all(_agree(g, e) for g, e in zip(given, expected, strict=True))
    if isinstance(expected, float):
        return isinstance(given, int | float) and math.isclose(given, expected, rel_tol=1e-6)
    if not isinstance(expected, Tensor):
        return bool(given == expected)
    if not isinstance(given, Tensor) or given.shape != expected.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(given.to(expected.dtype), expected)
    return torch.allclose(given.to(expected), expected, rtol=1e-4, atol=1e-6)


def _counterexample(name: str, case: dict[str, Any], given: Any, expected: Any) -> str:
    lines = [f"{name} differs from the specification on this input:"]
    lines += [f"  {argument} = {_show(value)}" for argument, value in case.items()]
    return "\n".join([*lines, f"expected {_show(expected)}", f"     got {_show(given)}"])


def _show(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_show(part) for part in value) + ")"
    if isinstance(value, Tensor):
        return f"{[round(number, 4) for number in value.flatten().tolist()]} {tuple(value.shape)}"
    return repr(value)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def normal(*shape: int) -> Tensor:
    """Standard normal numbers of this shape."""
    return torch.randn(shape)


def distinct(tokens: int, k: int, n_experts: int) -> Tensor:
    """k different experts for each token."""
    return torch.stack([torch.randperm(n_experts)[:k] for _ in range(tokens)])
