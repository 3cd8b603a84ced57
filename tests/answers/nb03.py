"""Answers to the exercises of notebook 03: the right one, and plausible wrong ones."""

import math
from collections.abc import Callable

import torch


# ---------------------------------------------------------------------------------- group_limited
def group_limited(
    logits, bias, k, n_groups, groups_kept, best=2, ruled_out=-torch.inf, biased=False, stable=True
):
    scores = logits.sigmoid()
    grouped = (scores + bias).unflatten(-1, (n_groups, -1))
    group_score = grouped.sort(dim=-1, descending=True).values[..., :best].sum(dim=-1)
    order = group_score.sort(dim=-1, descending=True, stable=stable).indices[:, :groups_kept]
    stays = torch.zeros_like(group_score).scatter(1, order, 1).bool()
    left = grouped.masked_fill(~stays[..., None], ruled_out).flatten(-2)
    experts = left.sort(dim=-1, descending=True, stable=stable).indices[:, :k]
    weights = (scores + bias if biased else scores).gather(1, experts)
    return experts, weights / weights.sum(dim=-1, keepdim=True)


def group_limited_with_zero_for_the_ruled_out(*args, **sizes):
    return group_limited(*args, **sizes, ruled_out=0.0)


def group_limited_by_the_best_of_a_group(*args, **sizes):
    return group_limited(*args, **sizes, best=1)


def group_limited_by_the_sum_of_a_group(*args, **sizes):
    return group_limited(*args, **sizes, best=1000)


def group_limited_with_biased_weights(*args, **sizes):
    return group_limited(*args, **sizes, biased=True)


def group_limited_without_groups(logits, bias, k, n_groups, groups_kept):
    return group_limited(logits, bias, k, 1, 1)


def group_limited_without_a_stable_order(*args, **sizes):
    return group_limited(*args, **sizes, stable=False)


def group_limited_not_renormalized(logits, **sizes):
    experts, _ = group_limited(logits, **sizes)
    return experts, logits.sigmoid().gather(1, experts)


# ---------------------------------------------------------------------------------- switch_layer
def switch_layer(x, W, maps, shake, training):
    seen = x * shake if training else x
    weight, expert = (seen @ W.T).softmax(dim=-1).max(dim=-1)
    return weight[:, None] * torch.einsum("tij,tj->ti", maps[expert], x)


def switch_layer_that_always_shakes(x, W, maps, shake, training):
    return switch_layer(x, W, maps, shake, True)


def switch_layer_that_never_shakes(x, W, maps, shake, training):
    return switch_layer(x, W, maps, shake, False)


def switch_layer_whose_experts_are_shaken(x, W, maps, shake, training):
    return switch_layer(x * shake if training else x, W, maps, torch.ones_like(x), training)


def switch_layer_that_writes_into_x(x, W, maps, shake, training):
    before = x.clone()
    if training:
        x *= shake
    weight, expert = (x @ W.T).softmax(dim=-1).max(dim=-1)
    return weight[:, None] * torch.einsum("tij,tj->ti", maps[expert], before)


def switch_layer_with_a_detached_weight(x, W, maps, shake, training):
    return switch_layer(x, W.detach(), maps, shake, training)


def switch_layer_with_weight_one(x, W, maps, shake, training):
    expert = ((x * shake if training else x) @ W.T).argmax(dim=-1)
    return torch.einsum("tij,tj->ti", maps[expert], x)


# --------------------------------------------------------------------------- expert_choice_padded
def expert_choice_padded(logits, k, mask, rounded=math.ceil, count=None, stable=True):
    p = logits.masked_fill(~mask[:, None], 0).softmax(dim=-1)
    taken = rounded((int(mask.sum()) if count is None else count) * k / p.shape[1])
    ranked = p.masked_fill(~mask[:, None], -1)
    order = ranked.sort(dim=0, descending=True, stable=stable).indices[:taken]
    return p * torch.zeros_like(p).scatter(0, order, 1)


def expert_choice_padded_rounded_down(logits, k, mask):
    return expert_choice_padded(logits, k, mask, rounded=math.floor)


def expert_choice_padded_with_a_softmax_over_tokens(logits, k, mask):
    p = logits.masked_fill(~mask[:, None], -torch.inf).softmax(dim=0)
    order = p.sort(dim=0, descending=True, stable=True).indices
    taken = order[: math.ceil(int(mask.sum()) * k / p.shape[1])]
    return p * torch.zeros_like(p).scatter(0, taken, 1)


def expert_choice_padded_with_ties_to_the_later_token(logits, k, mask):
    return expert_choice_padded(logits.flip(0), k, mask.flip(0)).flip(0)


def expert_choice_padded_without_a_stable_order(logits, k, mask):
    return expert_choice_padded(logits, k, mask, stable=False)


def expert_choice_padded_by_topk(logits, k, mask):
    p = logits.masked_fill(~mask[:, None], 0).softmax(dim=-1)
    taken = math.ceil(int(mask.sum()) * k / p.shape[1])
    order = p.masked_fill(~mask[:, None], -1).topk(taken, dim=0).indices
    return p * torch.zeros_like(p).scatter(0, order, 1)


def expert_choice_padded_that_counts_padding(logits, k, mask):
    weights = expert_choice_padded(logits, k, mask, count=len(mask))
    return weights * mask[:, None]


def expert_choice_padded_that_takes_padding(logits, k, mask):
    count = int(mask.sum())
    return expert_choice_padded(logits, k, torch.ones_like(mask), count=count) * mask[:, None]


def expert_choice_padded_that_multiplies_by_the_mask(logits, k, mask):
    p = logits.softmax(dim=-1) * mask[:, None]
    taken = math.ceil(int(mask.sum()) * k / p.shape[1])
    order = p.sort(dim=0, descending=True, stable=True).indices[:taken]
    return p * torch.zeros_like(p).scatter(0, order, 1)


def expert_choice_padded_renormalized(logits, k, mask):
    weights = expert_choice_padded(logits, k, mask)
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20)


ANSWERS: dict[str, tuple[Callable, list[Callable]]] = {
    "group_limited": (
        group_limited,
        [
            group_limited_with_zero_for_the_ruled_out,
            group_limited_by_the_best_of_a_group,
            group_limited_by_the_sum_of_a_group,
            group_limited_with_biased_weights,
            group_limited_without_groups,
            group_limited_without_a_stable_order,
            group_limited_not_renormalized,
        ],
    ),
    "switch_layer": (
        switch_layer,
        [
            switch_layer_that_always_shakes,
            switch_layer_that_never_shakes,
            switch_layer_whose_experts_are_shaken,
            switch_layer_that_writes_into_x,
            switch_layer_with_a_detached_weight,
            switch_layer_with_weight_one,
        ],
    ),
    "expert_choice_padded": (
        expert_choice_padded,
        [
            expert_choice_padded_rounded_down,
            expert_choice_padded_with_a_softmax_over_tokens,
            expert_choice_padded_with_ties_to_the_later_token,
            expert_choice_padded_without_a_stable_order,
            expert_choice_padded_by_topk,
            expert_choice_padded_that_counts_padding,
            expert_choice_padded_that_takes_padding,
            expert_choice_padded_that_multiplies_by_the_mask,
            expert_choice_padded_renormalized,
        ],
    ),
}
