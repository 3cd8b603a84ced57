"""Exercise checks of notebook 07: training a language model."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .grading import grade, normal


def rotary(attempt: Callable) -> None:
    """Exercise of 07: rotary(x [seq, features], theta) -> x, each row turned by its position."""

    def specification(x: Tensor, theta: float) -> Tensor:
        (seq, features), turned = x.shape, torch.empty_like(x)
        half = features // 2
        for p in range(seq):
            for i in range(half):
                a, b, angle = x[p, i], x[p, i + half], p * theta ** (-2 * i / features)
                turned[p, i] = a * math.cos(angle) - b * math.sin(angle)
                turned[p, i + half] = a * math.sin(angle) + b * math.cos(angle)
        return turned

    def cases() -> Iterator[dict[str, Any]]:
        for seq, features, theta in [(1, 2, 100.0), (2, 2, 100.0), (2, 4, 100.0), (5, 6, 10_000.0)]:
            yield {"x": normal(seq, features), "theta": theta}

    grade(attempt, specification, cases())


def steps_to_reach(attempt: Callable) -> None:
    """Exercise of 07: steps_to_reach(steps, losses, target) -> step, infinity if there is none."""

    def specification(steps: list[int], losses: list[float], target: float) -> float:
        for i, loss in enumerate(losses):
            if loss <= target:
                if i == 0:
                    return float(steps[0])
                part = (losses[i - 1] - target) / (losses[i - 1] - loss)
                return steps[i - 1] + part * (steps[i] - steps[i - 1])
        return math.inf

    def cases() -> Iterator[dict[str, Any]]:
        falling = {"steps": [100, 200], "losses": [4.0, 3.0]}
        yield {"steps": [50], "losses": [2.0], "target": 2.0}
        yield {"steps": [50], "losses": [2.0], "target": 1.0}  # never
        yield {**falling, "target": 4.5}  # from the start
        yield {**falling, "target": 3.25}
        yield {**falling, "target": 3.0}  # at an evaluation
        yield {**falling, "target": 2.5}
        yield {"steps": [10, 20, 40], "losses": [4.0, 2.0, 3.0], "target": 2.5}  # up again
        yield {"steps": [10, 20, 40, 80], "losses": [4.0, 5.0, 5.0, 1.0], "target": 3.0}

    grade(attempt, specification, cases())


def upcycle_ffn(attempt: Callable) -> None:
    """Exercise of 07: upcycle_ffn(gate_up, down, n_experts, total) -> the stacks of both."""

    def specification(
        gate_up: Tensor, down: Tensor, n_experts: int, total: float
    ) -> tuple[Tensor, Tensor]:
        into, out = [], []
        for _ in range(n_experts):
            into.append(gate_up.clone())
            out.append(down / total)
        return torch.stack(into), torch.stack(out)

    def cases() -> Iterator[dict[str, Any]]:
        for d_model, d_ff, n_experts, total in [
            (1, 1, 1, 1.0),
            (1, 1, 2, 1.0),
            (1, 1, 1, 0.5),
            (2, 3, 4, 0.25),
        ]:
            weights = {"gate_up": normal(2 * d_ff, d_model), "down": normal(d_model, d_ff)}
            yield {**weights, "n_experts": n_experts, "total": total}

    grade(attempt, specification, cases())
