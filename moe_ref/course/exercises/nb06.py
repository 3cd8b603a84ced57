"""Exercise checks of notebook 06: load balancing."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...specification import largest, softmax
from .grading import distinct, grade, normal


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
