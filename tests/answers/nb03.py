"""Answers to the exercises of notebook 03: the right one, and plausible wrong ones."""

import math
from collections.abc import Callable

import torch


# ---------------------------------------------------------------------------------- group_limited
def group_limited(ranked, k, n_groups, groups_kept, best=2, ruled_out=-torch.inf):
    grouped = ranked.unflatten(-1, (n_groups, -1))
    group_score = grouped.sort(dim=-1, descending=True).values[..., :best].sum(dim=-1)
    order = group_score.sort(dim=-1, descending=True, stable=True).indices[:, :groups_kept]
    stays = torch.zeros_like(group_score).scatter(1, order, 1).bool()
    left = grouped.masked_fill(~stays[..., None], ruled_out).flatten(-2)
    return left.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def group_limited_with_zero_for_the_ruled_out(ranked, k, n_groups, groups_kept):
    return group_limited(ranked, k, n_groups, groups_kept, ruled_out=0.0)


def group_limited_by_the_best_of_a_group(ranked, k, n_groups, groups_kept):
    return group_limited(ranked, k, n_groups, groups_kept, best=1)


def group_limited_by_the_sum_of_a_group(ranked, k, n_groups, groups_kept):
    return group_limited(ranked, k, n_groups, groups_kept, best=ranked.shape[1])


def group_limited_without_groups(ranked, k, n_groups, groups_kept):
    return group_limited(ranked, k, 1, 1)


# ---------------------------------------------------------------------------------- expert_choice
def expert_choice(logits, k, rounded=math.ceil):
    p = logits.softmax(dim=-1)
    order = p.sort(dim=0, descending=True, stable=True).indices
    taken = order[: rounded(len(p) * k / p.shape[1])]
    return p * torch.zeros_like(p).scatter(0, taken, 1)


def expert_choice_rounded_down(logits, k):
    return expert_choice(logits, k, rounded=math.floor)


def expert_choice_with_a_softmax_over_tokens(logits, k):
    return expert_choice(logits.T, k * len(logits) / logits.shape[1]).T


def expert_choice_with_ties_to_the_later_token(logits, k):
    return expert_choice(logits.flip(0), k).flip(0)


def expert_choice_renormalized(logits, k):
    weights = expert_choice(logits, k)
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20)


ANSWERS: dict[str, tuple[Callable, list[Callable]]] = {
    "group_limited": (
        group_limited,
        [
            group_limited_with_zero_for_the_ruled_out,
            group_limited_by_the_best_of_a_group,
            group_limited_by_the_sum_of_a_group,
            group_limited_without_groups,
        ],
    ),
    "expert_choice": (
        expert_choice,
        [
            expert_choice_rounded_down,
            expert_choice_with_a_softmax_over_tokens,
            expert_choice_with_ties_to_the_later_token,
            expert_choice_renormalized,
        ],
    ),
}
