"""Exercise checks of notebook 05: capacity."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...capacity import Capacity
from ...routers import TopKRouter
from ...specification import largest
from .grading import distinct, grade, normal, predict, tied


def fair_drop(guess: float | None) -> None:
    """Exercise of 05: percent dropped by a fair router of 256 experts, top-8, 64 tokens."""
    why = (
        "An even share is 64 * 8 / 256 = 2 tokens for each expert, and chance moves that by about"
        " its root, 1.4: what counts is the tokens of one expert, not those of the batch."
    )
    predict(guess, _fair_drop, 4, why)


def _fair_drop() -> float:
    """Mean over 100 batches, in percent."""
    router, rule = TopKRouter(256, 256, 8).requires_grad_(False), Capacity(1.0)
    router.weight.copy_(torch.eye(256))  # logits are the features: equal chances for all
    dropped = [rule(router(torch.randn(64, 256))).dropped_fraction for _ in range(100)]
    return 100 * torch.stack(dropped).mean().item()


def drop_overflow(attempt: Callable) -> None:
    """Exercise of 05: drop_overflow(experts [tokens, k], limit, n_experts) -> experts."""

    def specification(experts: Tensor, limit: int, n_experts: int) -> Tensor:
        kept, room = torch.full_like(experts, n_experts), [limit] * n_experts
        for slot in range(experts.shape[1]):  # all first choices before any second
            for t, e in enumerate(experts[:, slot].tolist()):
                if e < n_experts and room[e] > 0:
                    kept[t, slot], room[e] = e, room[e] - 1
        return kept

    def cases() -> Iterator[tuple[str, dict[str, Any]]]:
        rule = "earlier choices go first, each in the order of tokens"
        tight = torch.tensor([[0, 1], [1, 0]])  # token 0's second choice is token 1's first
        yield rule, {"experts": tight, "limit": 1, "n_experts": 2}
        for tokens, k, n_experts, limit in [
            (1, 1, 1, 1),
            (4, 1, 2, 1),
            (6, 2, 3, 3),
            (3, 3, 3, 2),
            (8, 4, 4, 5),
        ]:
            experts = distinct(tokens, k, n_experts)
            yield rule, {"experts": experts, "limit": limit, "n_experts": n_experts}
        padded = torch.tensor([[3, 3], [0, 1], [3, 3], [0, 1], [3, 3]])  # 3 is nobody
        yield rule, {"experts": padded, "limit": 1, "n_experts": 3}

    def within_limit(given: Tensor, experts: Tensor, limit: int, n_experts: int) -> bool:
        return _within_limit(given, n_experts, limit)

    def no_place_wasted(given: Tensor, experts: Tensor, limit: int, n_experts: int) -> bool:
        kept, asked = (e.flatten().bincount(minlength=n_experts) for e in (given, experts))
        return bool((kept[:n_experts] >= asked[:n_experts].clamp(max=limit)).all())

    rules = {
        "no expert serves more than its limit": within_limit,
        "nobody is dropped while the expert has a place": no_place_wasted,
    }
    grade(attempt, specification, cases(), kind="bug", rules=rules)


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

    def cases() -> Iterator[Any]:
        rounds = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.7, 0.2, 0.1], [0.6, 0.1, 0.3]])
        yield {"scores": torch.tensor([[0.7, 0.3], [0.6, 0.4]]), "k": 1, "limit": 1}
        rule = "nobody's third choice is heard before everybody's second"
        yield rule, {"scores": rounds, "k": 1, "limit": 1}
        yield {"scores": torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]]), "k": 2, "limit": 1}
        for tokens, n_experts, k, limit in [(1, 1, 1, 1), (4, 4, 2, 2), (4, 2, 2, 3), (6, 4, 3, 4)]:
            scores = normal(tokens, n_experts).softmax(dim=-1)
            yield {"scores": scores, "k": k, "limit": limit}
        ties = "of equal scores the lower expert index comes first"
        for scores, limit in [(torch.full((5, 3), 1 / 3), 3), (tied(4, 64), 1)]:
            yield ties, {"scores": scores, "k": 2, "limit": limit}

    def apart(given: Tensor, scores: Tensor, **_: Any) -> bool:
        rows = ([e for e in row if e < scores.shape[1]] for row in given.tolist())
        return all(len(set(row)) == len(row) for row in rows)

    def within_limit(given: Tensor, scores: Tensor, k: int, limit: int) -> bool:
        return _within_limit(given, scores.shape[1], limit)

    def no_place_left(given: Tensor, scores: Tensor, k: int, limit: int) -> bool:
        counts = given.flatten().bincount(minlength=scores.shape[1]).tolist()
        room = {e for e in range(scores.shape[1]) if counts[e] < limit}
        return not any(scores.shape[1] in row and room - set(row) for row in given.tolist())

    rules: dict[str, Callable[..., bool]] = {
        "two slots of a token never share an expert": apart,
        "no expert serves more than its limit": within_limit,
        "a slot stays empty only if no other expert has room": no_place_left,
    }
    grade(attempt, specification, cases(), rules=rules)


def _within_limit(experts: Tensor, n_experts: int, limit: int) -> bool:
    served = experts[experts < n_experts]
    return bool((served.bincount() <= limit).all())
