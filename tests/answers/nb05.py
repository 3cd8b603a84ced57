"""Answers to the exercises of notebook 05: the right one, and plausible wrong ones."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F


# --------------------------------------------------------------------------------- capacity_limit
def capacity_limit(factor, k, tokens, n_experts, minimum):
    if math.isinf(factor):
        return tokens
    return min(tokens, max(minimum, math.ceil(round(factor * k * tokens / n_experts, 6))))


def capacity_limit_rounded_down(factor, k, tokens, n_experts, minimum):
    if math.isinf(factor):
        return tokens
    return min(tokens, max(minimum, int(factor * k * tokens / n_experts)))


def capacity_limit_without_k(factor, k, tokens, n_experts, minimum):
    return capacity_limit(factor, 1, tokens, n_experts, minimum)


def capacity_limit_of_binary_fractions(factor, k, tokens, n_experts, minimum):
    if math.isinf(factor):
        return tokens
    return min(tokens, max(minimum, math.ceil(factor * k * tokens / n_experts)))


def capacity_limit_above_the_tokens(factor, k, tokens, n_experts, minimum):
    return max(minimum, capacity_limit(factor, k, tokens, n_experts, 0))


# ---------------------------------------------------------------------------------- drop_overflow
def drop_overflow(experts, limit, n_experts):
    queue = experts.T.flatten()
    place = F.one_hot(queue, n_experts + 1).cumsum(dim=0).gather(1, queue[:, None])[:, 0]
    return queue.masked_fill(place > limit, n_experts).view(experts.T.shape).T


def drop_overflow_by_position(experts, limit, n_experts):
    return drop_overflow(experts.reshape(-1, 1), limit, n_experts).view(experts.shape)


def drop_overflow_one_too_many(experts, limit, n_experts):
    return drop_overflow(experts, limit + 1, n_experts)


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


ANSWERS: dict[str, tuple[Callable, list[Callable]]] = {
    "capacity_limit": (
        capacity_limit,
        [
            capacity_limit_rounded_down,
            capacity_limit_without_k,
            capacity_limit_of_binary_fractions,
            capacity_limit_above_the_tokens,
        ],
    ),
    "drop_overflow": (
        drop_overflow,
        [drop_overflow_by_position, drop_overflow_one_too_many, drop_overflow_of_each_slot],
    ),
    "reroute": (
        reroute,
        [reroute_never, reroute_token_after_token, reroute_twice_to_one_expert],
    ),
}
