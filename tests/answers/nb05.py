"""Answers to the exercises of notebook 05: the right one, and plausible wrong ones."""

import math
from typing import Any

import torch
import torch.nn.functional as F


# -------------------------------------------------------------------------------------- fair_drop
def fair_drop():
    """Poisson with mean 2: as many tokens are over the limit of 2 as places are empty."""
    return 100 * (2 * math.exp(-2) + 1 * 2 * math.exp(-2)) / 2


# ---------------------------------------------------------------------------------- drop_overflow
def drop_overflow(experts, limit, n_experts):
    queue = experts.T.flatten()
    place = F.one_hot(queue, n_experts + 1).cumsum(dim=0).gather(1, queue[:, None])[:, 0]
    return queue.masked_fill(place > limit, n_experts).view(experts.T.shape).T


def drop_overflow_counting_only_the_last_choice(experts, limit, n_experts):
    kept, taken = experts.clone(), 0
    for slot in range(experts.shape[1]):
        asked = F.one_hot(experts[:, slot], n_experts + 1)
        place = (asked.cumsum(dim=0) + taken).gather(1, experts[:, slot, None])
        kept[place[:, 0] > limit, slot] = n_experts
        taken = asked.sum(dim=0)
    return kept


def drop_overflow_by_position(experts, limit, n_experts):
    return drop_overflow(experts.reshape(-1, 1), limit, n_experts).view(experts.shape)


def drop_overflow_one_too_many(experts, limit, n_experts):
    return drop_overflow(experts, limit + 1, n_experts)


def drop_overflow_never(experts, limit, n_experts):
    """What a cumulative sum along an axis of one entry does: every place is the first."""
    chosen = F.one_hot(experts[:, :, None], n_experts + 1)
    place = chosen.cumsum(dim=2).amax(dim=(2, 3))
    return experts.masked_fill(place > limit, n_experts)


def drop_overflow_one_too_few(experts, limit, n_experts):
    return drop_overflow(experts, limit - 1, n_experts)


def drop_overflow_of_each_slot(experts, limit, n_experts):
    columns = [drop_overflow(column[:, None], limit, n_experts) for column in experts.T]
    return torch.cat(columns, dim=1)


# ---------------------------------------------------------------------------------------- reroute
def reroute(scores, k, limit):
    tokens, n_experts = scores.shape
    experts, room = torch.full((tokens, k), n_experts), [limit] * n_experts
    ranked = scores.argsort(dim=1, descending=True, stable=True).tolist()
    while True:
        asked = {}
        for t, mine in enumerate(experts.tolist()):
            best = [e for e in ranked[t] if room[e] > 0 and e not in mine]
            empty = [slot for slot in range(k) if mine[slot] == n_experts]
            asked.update({(slot, t): e for slot, e in zip(empty, best, strict=False)})
        if not asked:
            return experts
        for (slot, t), e in sorted(asked.items()):
            if room[e] > 0:
                experts[t, slot], room[e] = e, room[e] - 1


def reroute_never(scores, k, limit):
    ranked = scores.argsort(dim=1, descending=True, stable=True)
    return drop_overflow(ranked[:, :k], limit, scores.shape[1])


def reroute_token_after_token(scores, k, limit):
    kept, room = reroute_never(scores, k, limit).tolist(), [limit] * scores.shape[1]
    for e in [e for mine in kept for e in mine]:
        if e < len(room):
            room[e] -= 1
    for t, mine in enumerate(kept):
        for slot, e in enumerate(mine):
            ranked = scores[t].argsort(descending=True, stable=True).tolist()
            free = [e for e in ranked if room[e] > 0 and e not in mine]
            if e == len(room) and free:
                mine[slot] = free[0]
                room[free[0]] -= 1
    return torch.tensor(kept)


def reroute_twice_to_one_expert(scores, k, limit):
    room, columns = [limit] * scores.shape[1], []
    for _ in range(k):
        column = []
        for row in scores.argsort(dim=1, descending=True, stable=True).tolist():
            column.append(next((e for e in row if room[e] > 0), scores.shape[1]))
            if column[-1] < len(room):
                room[column[-1]] -= 1
        columns.append(column)
    return torch.tensor(columns).T


def reroute_with_ties_to_the_last_expert(scores, k, limit):
    last = scores.shape[1] - 1
    mirrored = reroute(scores.flip(1), k, limit)
    return torch.where(mirrored > last, mirrored, last - mirrored)


ANSWERS: dict[str, tuple[Any, list[Any]]] = {
    "fair_drop": (fair_drop, [0, 10, 12.5, 50]),
    "drop_overflow": (
        drop_overflow,
        [
            drop_overflow_counting_only_the_last_choice,
            drop_overflow_by_position,
            drop_overflow_one_too_many,
            drop_overflow_one_too_few,
            drop_overflow_of_each_slot,
            drop_overflow_never,
        ],
    ),
    "reroute": (
        reroute,
        [
            reroute_never,
            reroute_token_after_token,
            reroute_twice_to_one_expert,
            reroute_with_ties_to_the_last_expert,
        ],
    ),
}
