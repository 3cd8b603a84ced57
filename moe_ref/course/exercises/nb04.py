"""Exercise checks of notebook 04: dispatch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .grading import distinct, grade, normal


def padding_waste(attempt: Callable) -> None:
    """Exercise of 04: padding_waste(counts [n_experts]) -> share of the padded rows left empty."""

    def specification(counts: Tensor) -> float:
        sizes = counts.tolist()
        cells = len(sizes) * max(sizes)
        return (cells - sum(sizes)) / cells if cells else 0.0

    def cases() -> Iterator[dict[str, Any]]:
        for sizes in ([1], [1, 1], [2, 0], [3, 1, 2], [0, 8, 0, 0], [0, 0], [5, 3, 9, 1, 0, 7]):
            yield {"counts": torch.tensor(sizes)}

    grade(attempt, specification, cases())


def permutation(attempt: Callable) -> None:
    """Exercise of 04: permutation(experts [tokens, k], n_experts) -> slot of each row [rows]."""

    def specification(experts: Tensor, n_experts: int) -> Tensor:
        owners, order = experts.flatten().tolist(), []
        for expert in range(n_experts):
            order += [slot for slot, owner in enumerate(owners) if owner == expert]
        return torch.tensor(order, dtype=torch.long)

    def cases() -> Iterator[dict[str, Any]]:
        for tokens, k, n_experts in [(1, 1, 1), (2, 1, 2), (1, 2, 2), (3, 2, 3), (12, 3, 6)]:
            experts = distinct(tokens, k, n_experts)
            yield {"experts": experts, "n_experts": n_experts}
            dropped = experts.masked_fill(torch.rand(tokens, k) < 0.4, n_experts)
            yield {"experts": dropped, "n_experts": n_experts}
        yield {"experts": torch.zeros(24, 1, dtype=torch.long), "n_experts": 2}  # one takes all
        yield {"experts": torch.full((2, 2), 3), "n_experts": 3}  # nobody takes any

    grade(attempt, specification, cases())


def combine(attempt: Callable) -> None:
    """Exercise of 04: combine(rows [rows, d_model], order [rows], weights [tokens, k])."""

    def specification(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros(len(weights), rows.shape[1])
        for row, slot in zip(rows, order.tolist(), strict=True):
            token, place = divmod(slot, weights.shape[1])
            y[token] += weights[token, place] * row
        return y

    def cases() -> Iterator[dict[str, Any]]:
        for tokens, k, d_model, dropped in [
            (1, 1, 1, 0),
            (2, 1, 1, 0),
            (1, 2, 1, 0),
            (2, 2, 1, 0),
            (2, 2, 1, 1),
            (3, 1, 2, 2),
            (9, 3, 4, 7),
            (2, 2, 1, 4),  # nobody serves anybody
        ]:
            order = torch.randperm(tokens * k)[dropped:]
            weights = torch.rand(tokens, k)
            yield {"rows": normal(len(order), d_model), "order": order, "weights": weights}

    grade(attempt, specification, cases())
