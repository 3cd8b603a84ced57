"""Exercise checks of the second part of the course, training: notebooks 06 and 07."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .grading import distinct, grade, normal
from .specification import largest, softmax


def balance_loss(attempt: Callable) -> None:
    """Exercise of 06: balance_loss(logits [tokens, n_experts], k) -> E * sum of f_i P_i."""

    def specification(logits: Tensor, k: int) -> Tensor:
        tokens, n_experts = logits.shape
        scores = torch.stack([softmax(token) for token in logits])
        chosen = [e for token in scores.tolist() for e in largest(token, k)]
        shares = torch.tensor([chosen.count(e) / (tokens * k) for e in range(n_experts)])
        return n_experts * (shares * scores.mean(dim=0)).sum()

    def cases() -> Iterator[dict[str, Any]]:
        for tokens, n_experts, k in [(1, 1, 1), (1, 2, 1), (2, 3, 2), (3, 4, 4), (9, 8, 2)]:
            yield {"logits": 2 * normal(tokens, n_experts), "k": k}
        yield {"logits": torch.zeros(3, 4), "k": 2}  # ties: 1, whoever wins them
        yield {"logits": torch.tensor([[3.0, 1.0, 0.0]]).repeat(5, 1), "k": 1}  # one takes all

    grade(attempt, specification, cases())


def bias_update(attempt: Callable) -> None:
    """Exercise of 06: bias_update(bias [n_experts], experts [tokens, k], rate) -> [n_experts]."""

    def specification(bias: Tensor, experts: Tensor, rate: float) -> Tensor:
        flat, n_experts = experts.flatten().tolist(), len(bias)
        updated = []
        for e in range(n_experts):
            short = len(flat) - n_experts * flat.count(e)  # of the mean; whole, so exact
            updated.append(bias[e] + rate * ((short > 0) - (short < 0)))
        return torch.stack(updated)

    def cases() -> Iterator[dict[str, Any]]:
        for tokens, k, n_experts in [(1, 1, 1), (1, 1, 2), (3, 1, 3), (4, 2, 4), (7, 3, 8)]:
            experts = distinct(tokens, k, n_experts)
            yield {"bias": 0.1 * normal(n_experts), "experts": experts, "rate": 0.05}
        yield {"bias": torch.zeros(3), "experts": torch.tensor([[0], [0], [1]]), "rate": 0.001}

    grade(attempt, specification, cases())


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
