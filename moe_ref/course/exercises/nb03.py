"""Exercise checks of notebook 03: routing strategies."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...specification import largest, softmax
from .grading import grade, normal


def group_limited(attempt: Callable) -> None:
    """Exercise of 03: group_limited(ranked, k, n_groups, groups_kept) -> experts [tokens, k]."""

    def specification(ranked: Tensor, k: int, n_groups: int, groups_kept: int) -> Tensor:
        size, experts = ranked.shape[1] // n_groups, []
        for scores in ranked.tolist():
            groups = [scores[g * size : (g + 1) * size] for g in range(n_groups)]
            best = largest([sum(sorted(group)[-2:]) for group in groups], groups_kept)
            left = [e for e in range(len(scores)) if e // size in best]
            experts.append([left[i] for i in largest([scores[e] for e in left], k)])
        return torch.tensor(experts)

    def cases() -> Iterator[dict[str, Any]]:
        below_zero = torch.tensor([[-0.5, -0.25, -0.75, -1.0]])  # a biased score may be
        yield {"ranked": below_zero, "k": 2, "n_groups": 2, "groups_kept": 1}
        one_star = torch.tensor([[1.0, 0.0, 0.75, 0.5, 0.25, 0.5]])  # the best expert is ruled out
        yield {"ranked": one_star, "k": 2, "n_groups": 3, "groups_kept": 1}
        crowded = torch.tensor([[0.5, 0.5, 0.5, 0.75, 0.5, 0.0]])  # a third expert doesn't count
        yield {"ranked": crowded, "k": 1, "n_groups": 2, "groups_kept": 1}
        tied = {"ranked": torch.zeros(2, 8), "n_groups": 4}
        yield {**tied, "k": 3, "groups_kept": 2}
        yield {"ranked": torch.ones(1, 24), "k": 3, "n_groups": 12, "groups_kept": 4}
        for tokens, n_experts, k, n_groups, groups_kept in [
            (1, 1, 1, 1, 1),
            (2, 4, 2, 4, 2),
            (3, 4, 4, 2, 2),
            (5, 12, 3, 4, 2),
            (9, 16, 4, 4, 3),
        ]:
            sizes = {"k": k, "n_groups": n_groups, "groups_kept": groups_kept}
            yield {"ranked": normal(tokens, n_experts), **sizes}

    grade(attempt, specification, cases())


def expert_choice(attempt: Callable) -> None:
    """Exercise of 03: expert_choice(logits, k) -> weights [tokens, n_experts], 0 if not chosen."""

    def specification(logits: Tensor, k: float) -> Tensor:
        scores, weights = torch.stack([softmax(token) for token in logits]), logits * 0
        taken = min(len(logits), math.ceil(len(logits) * k / logits.shape[1]))
        for e in range(logits.shape[1]):
            for t in largest(scores[:, e].tolist(), taken):
                weights[t, e] = scores[t, e]
        return weights

    def cases() -> Iterator[dict[str, Any]]:
        for tokens, n_experts, k in [(1, 1, 1), (2, 2, 1), (3, 2, 1), (4, 3, 1.5), (7, 4, 2)]:
            yield {"logits": 2 * normal(tokens, n_experts), "k": k}
        yield {"logits": torch.zeros(3, 2), "k": 1}  # tied: the earlier tokens
        yield {"logits": normal(4, 3), "k": 3}  # everybody takes everybody

    grade(attempt, specification, cases())
