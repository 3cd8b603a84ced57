"""Exercise checks of notebook 07: training a language model."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .grading import Case, grade, normal


def rotary(attempt: Callable) -> None:
    """Exercise of 07: rotary(x [seq, features], theta) -> x, each row rotated by its position."""

    def specification(x: Tensor, theta: float) -> Tensor:
        (seq, features), turned = x.shape, torch.empty_like(x)
        half = features // 2
        for p in range(seq):
            for i in range(half):
                a, b, angle = x[p, i], x[p, i + half], p * theta ** (-2 * i / features)
                turned[p, i] = a * math.cos(angle) - b * math.sin(angle)
                turned[p, i + half] = a * math.sin(angle) + b * math.cos(angle)
        return turned

    def cases() -> Iterator[Case]:
        yield "the token at position 0 stays as it is", {"x": normal(1, 2), "theta": 100.0}
        turned = "row p is rotated by p * theta_i, from the first feature towards the second"
        yield turned, {"x": normal(2, 2), "theta": 100.0}
        paired = "feature i is paired with feature i + m / 2, not with its neighbour"
        for seq, features, theta in [(2, 4, 100.0), (5, 6, 10_000.0)]:
            yield paired, {"x": normal(seq, features), "theta": theta}

    grade(attempt, specification, cases())


def fold(attempt: Callable) -> None:
    """Bug of 07: fold(gate_up, down, scale) -> (gate_up, down) of an answer `scale` times as large.

    Compared is the answer of the expert, not its matrices: there is more than one right way.
    """

    def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (x @ gate_up.T).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ down.T

    def specification(x: Tensor, gate_up: Tensor, down: Tensor, scale: float) -> Tensor:
        return scale * swiglu(x, gate_up, down)

    def answer(x: Tensor, gate_up: Tensor, down: Tensor, scale: float) -> Any:
        folded = attempt(gate_up, down, scale)
        return swiglu(x, *folded) if isinstance(folded, tuple | list) else folded

    def cases() -> Iterator[Case]:
        rule = "with the folded matrices the answer to x is scale times what it was"
        for tokens, d_model, d_ff, scale in [(1, 1, 1, 2.0), (1, 2, 3, 1.0), (3, 4, 6, 0.5)]:
            weights = {"gate_up": normal(2 * d_ff, d_model), "down": normal(d_model, d_ff)}
            yield rule, {"x": normal(tokens, d_model), **weights, "scale": scale}

    answer.__name__ = attempt.__name__
    grade(answer, specification, cases(), kind="bug")


def upcycle_ffn(attempt: Callable) -> None:
    """Bug of 07: upcycle_ffn(gate_up, down, n_experts, total) -> the stacks of both."""

    def specification(
        gate_up: Tensor, down: Tensor, n_experts: int, total: float
    ) -> tuple[Tensor, Tensor]:
        into, out = [], []
        for _ in range(n_experts):
            into.append(gate_up.clone())
            out.append(down / total)
        return torch.stack(into), torch.stack(out)

    def cases() -> Iterator[Case]:
        rule = "weights that add up to total times an expert's answer give the block's answer"
        for d_model, d_ff, n_experts, total in [
            (1, 1, 1, 0.5),
            (1, 1, 2, 1.0),
            (1, 1, 1, 1.0),
            (2, 3, 4, 0.25),
        ]:
            weights = {"gate_up": normal(2 * d_ff, d_model), "down": normal(d_model, d_ff)}
            yield rule, {**weights, "n_experts": n_experts, "total": total}

    grade(attempt, specification, cases(), kind="bug", own_memory=True)
