"""Exercise checks of notebook 05: capacity."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ...specification import largest
from .grading import distinct, grade, normal


def capacity_limit(attempt: Callable) -> None:
    """Exercise of 05: capacity_limit(factor, k, tokens, n_experts, minimum) -> places."""

    def specification(factor: float, k: int, tokens: int, n_experts: int, minimum: int) -> int:
        if math.isinf(factor):
            return tokens
        share = Fraction(str(factor)) * k * tokens / n_experts  # 1.1 counts as 11/10
        return min(tokens, max(minimum, math.ceil(share)))

    def cases() -> Iterator[dict[str, Any]]:
        for factor, k, tokens, n_experts, minimum in [
            (1.0, 1, 8, 8, 1),
            (1.0, 1, 5, 8, 0),
            (1.0, 2, 5, 4, 1),
            (1.25, 2, 100, 8, 4),
            (0.1, 1, 10, 8, 4),
            (1.0, 1, 2, 8, 4),
            (8.0, 2, 16, 8, 1),
            (1.1, 1, 100, 10, 1),
            (math.inf, 2, 6, 4, 1),
        ]:
            sizes = {"k": k, "tokens": tokens, "n_experts": n_experts}
            yield {"factor": factor, **sizes, "minimum": minimum}

    grade(attempt, specification, cases())


def drop_overflow(attempt: Callable) -> None:
    """Exercise of 05: drop_overflow(experts [tokens, k], limit, n_experts) -> experts."""

    def specification(experts: Tensor, limit: int, n_experts: int) -> Tensor:
        kept, room = torch.full_like(experts, n_experts), [limit] * n_experts
        for slot in range(experts.shape[1]):  # all first choices before any second
            for t, e in enumerate(experts[:, slot].tolist()):
                if e < n_experts and room[e] > 0:
                    kept[t, slot], room[e] = e, room[e] - 1
        return kept

    def cases() -> Iterator[dict[str, Any]]:
        tight = torch.tensor([[0, 1], [1, 0]])  # token 0's second choice is token 1's first
        yield {"experts": tight, "limit": 1, "n_experts": 2}
        for tokens, k, n_experts, limit in [(1, 1, 1, 1), (4, 1, 2, 1), (6, 2, 3, 3), (8, 4, 4, 5)]:
            experts = distinct(tokens, k, n_experts)
            yield {"experts": experts, "limit": limit, "n_experts": n_experts}
        padded = torch.tensor([[3, 3], [0, 1], [3, 3], [0, 1], [3, 3]])  # 3 is nobody
        yield {"experts": padded, "limit": 1, "n_experts": 3}

    grade(attempt, specification, cases())


def reroute(attempt: Callable) -> None:
    """Exercise of 05: reroute(scores [tokens, n_experts], k, limit) -> experts [tokens, k]."""

    def specification(scores: Tensor, k: int, limit: int) -> Tensor:
        tokens, nobody = scores.shape
        slots, room = [[nobody] * k for _ in range(tokens)], [limit] * nobody
        while True:
            asked = []  # (slot, token, expert)
            for t in range(tokens):
                ranked = largest(scores[t].tolist(), nobody)
                best = [e for e in ranked if room[e] > 0 and e not in slots[t]]
                empty = [slot for slot in range(k) if slots[t][slot] == nobody]
                asked += [(slot, t, e) for slot, e in zip(empty, best, strict=False)]
            if not asked:
                return torch.tensor(slots)
            for slot, t, e in sorted(asked):
                if room[e] > 0:
                    slots[t][slot], room[e] = e, room[e] - 1

    def cases() -> Iterator[dict[str, Any]]:
        # Nobody's third choice is heard before everybody's second.
        rounds = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.7, 0.2, 0.1], [0.6, 0.1, 0.3]])
        yield {"scores": torch.tensor([[0.7, 0.3], [0.6, 0.4]]), "k": 1, "limit": 1}
        yield {"scores": rounds, "k": 1, "limit": 1}
        yield {"scores": torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]]), "k": 2, "limit": 1}
        for tokens, n_experts, k, limit in [(1, 1, 1, 1), (4, 4, 2, 2), (4, 2, 2, 3), (6, 4, 3, 4)]:
            scores = normal(tokens, n_experts).softmax(dim=-1)
            yield {"scores": scores, "k": k, "limit": limit}
        yield {"scores": torch.full((5, 3), 1 / 3), "k": 2, "limit": 3}  # all tied

    grade(attempt, specification, cases())
