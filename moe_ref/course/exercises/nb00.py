"""Exercise checks of notebook 00: reading a routing."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .grading import distinct, grade


def expert_counts(attempt: Callable) -> None:
    """Exercise of 00: expert_counts(experts [tokens, k], n_experts) -> tokens of each expert."""

    def specification(experts: Tensor, n_experts: int) -> Tensor:
        flat = experts.flatten().tolist()
        return torch.tensor([flat.count(e) for e in range(n_experts)])

    def cases() -> Iterator[dict[str, Any]]:
        for tokens, k, n_experts in [(1, 1, 1), (1, 2, 3), (2, 1, 3), (4, 2, 4), (6, 3, 8)]:
            yield {"experts": distinct(tokens, k, n_experts), "n_experts": n_experts}
        yield {"experts": torch.zeros(3, 1, dtype=torch.long), "n_experts": 4}  # one takes all

    grade(attempt, specification, cases())
