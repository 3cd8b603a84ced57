"""Exercise checks of notebook 01: the dense block."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...ffn import FeedForward
from ...specification import feed_forward
from .grading import Case, grade, normal, predict


def swiglu(attempt: Callable) -> None:
    """Bug of 01: swiglu(x [tokens, d_model], gate_up, down) -> [tokens, d_model]."""

    def specification(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return torch.stack([feed_forward(token, gate_up, down) for token in x])

    def one(gate: float, up: float) -> dict[str, Tensor]:
        """One token of one feature, 1, so that gate and up are the weights themselves."""
        one = torch.ones(1, 1)
        return {"x": one, "gate_up": torch.tensor([[gate], [up]]), "down": one.clone()}

    def cases() -> Iterator[Case]:
        yield "where the gate is far below zero, nothing passes", one(gate=-20.0, up=3.0)
        yield "what passes the gate is not bent itself: below zero it stays", one(20.0, -3.0)
        yield "the gate goes through SiLU, z times its sigmoid", one(1.0, 1.0)
        for tokens, d_model, d_ff in [(1, 1, 2), (2, 2, 3), (3, 4, 2), (5, 8, 16)]:
            gate_up, down = normal(d_ff * 2, d_model), normal(d_model, d_ff)
            rule = "the rows of the gate stand together, and so do those of up"
            yield rule, {"x": normal(tokens, d_model), "gate_up": gate_up, "down": down}

    grade(attempt, specification, cases(), kind="bug")


def backward_work(guess: tuple[float, float] | None) -> None:
    """Guess of 01: backward FLOPs over forward FLOPs, weights frozen and input without gradient."""

    def measured(weights: bool, into: bool) -> float:
        block = FeedForward(8, 16).requires_grad_(weights)
        x = torch.randn(4, 8, requires_grad=into)
        with FlopCounterMode(display=False) as forward:
            y = block(x).sum()
        with FlopCounterMode(display=False) as backward:
            y.backward()
        return backward.get_total_flops() / forward.get_total_flops()

    def truth() -> list[float]:
        return [measured(weights=False, into=True), measured(weights=True, into=False)]

    why = (
        "Each of the three matrices costs one product for the gradient of its weights and one for "
        "the gradient of its input. Frozen weights save the first kind, 3 products of 6; the "
        "gradient must still pass through to whatever learns below. An input that needs no "
        "gradient saves only the second kind of gate and up, 2 of 6: down's input is the hidden "
        "features, and they need theirs."
    )
    predict(guess, truth, 0.05, why)


def balance_tokens(attempt: Callable) -> None:
    """Exercise of 01: balance_tokens(d_in, d_out, peak, bandwidth, size) -> tokens, or infinity."""

    def specification(d_in: int, d_out: int, peak: float, bandwidth: float, size: float) -> float:
        def behind(tokens: int) -> Fraction:
            """Seconds by which the arithmetic is shorter than the moving of bytes."""
            numbers = d_in * d_out + tokens * (d_in + d_out)
            moving = Fraction(size) * numbers / Fraction(bandwidth)
            return moving - Fraction(2 * tokens * d_in * d_out) / Fraction(peak)

        gained = behind(0) - behind(1)  # by each token: both times are straight lines
        return float(behind(0) / gained) if gained > 0 else math.inf

    def cases() -> Iterator[Case]:
        square, machine = {"d_in": 16, "d_out": 16}, _machine(64.0, 16.0, 1.0)
        yield "a weight costs 2 FLOPs for each token", square | machine
        yield "a faster processor needs more tokens", square | machine | {"peak": 128.0}
        yield "a faster memory needs fewer tokens", square | machine | {"bandwidth": 32.0}
        yield "a number of more bytes takes longer to move", square | machine | {"size": 2.0}
        yield "d_in numbers come in for a token, d_out go out", square | machine | {"d_out": 8}
        thin = "if each token moves for as long as it computes, there is no balance: infinity"
        yield thin, square | machine | {"peak": 512.0}
        yield thin, {"d_in": 8, "d_out": 8} | machine | {"peak": 128.0}
        for d_in, d_out in [(4096, 14336), (7168, 2048), (2048, 768)]:
            about = "of three published expert shapes on an H100"
            yield about, {"d_in": d_in, "d_out": d_out} | _machine(989e12, 3.35e12, 2.0)

    def counts_tokens(given: float, peak: float, bandwidth: float, size: float, **_: int) -> bool:
        return not math.isclose(given, peak * size / (2 * bandwidth))

    rules = {"the tokens' own bytes move too": counts_tokens}
    grade(attempt, specification, cases(), rules=rules)


def _machine(peak: float, bandwidth: float, size: float) -> dict[str, float]:
    return {"peak": peak, "bandwidth": bandwidth, "size": size}
