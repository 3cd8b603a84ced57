"""Answers to the exercises of notebook 09: the right one, and plausible wrong ones."""

import math
from typing import Any

import torch
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------- assemble
def assemble(patches, height, width):
    size = math.isqrt(patches.shape[-1])
    grid = patches.view(-1, height // size, width // size, size, size)
    return grid.transpose(2, 3).reshape(-1, height, width)


def assemble_by_fold(patches, height, width):
    size = math.isqrt(patches.shape[-1])
    return F.fold(patches.mT, (height, width), size, stride=size)[:, 0]


def assemble_by_reshaping(patches, height, width):
    return patches.reshape(-1, height, width)


def assemble_down_the_columns(patches, height, width):
    size = math.isqrt(patches.shape[-1])
    grid = patches.view(-1, width // size, height // size, size, size)
    return grid.permute(0, 2, 3, 1, 4).reshape(-1, height, width)


def assemble_patches_on_their_side(patches, height, width):
    size = math.isqrt(patches.shape[-1])
    return assemble(patches.unflatten(-1, (size, size)).mT.flatten(-2), height, width)


def assemble_on_its_side(patches, height, width):
    return assemble(patches, width, height).mT


# ---------------------------------------------------------------------------------- admit_by_score
def _admit(order, back, experts, limit, n_experts):
    wanted = experts.flatten()[order]
    place = F.one_hot(wanted, n_experts + 1).cumsum(dim=0).gather(1, wanted[:, None])[:, 0]
    return wanted.masked_fill(place > limit, n_experts)[back].view(experts.shape)


def admit_by_score(experts, weights, limit, n_experts):
    order = weights.flatten().argsort(descending=True, stable=True)
    return _admit(order, order.argsort(), experts, limit, n_experts)


def admit_by_score_with_an_unstable_sort(experts, weights, limit, n_experts):
    order = weights.flatten().argsort(descending=True)
    return _admit(order, order.argsort(), experts, limit, n_experts)


def admit_by_score_from_the_other_end_of_a_stable_sort(experts, weights, limit, n_experts):
    order = weights.flatten().argsort(stable=True).flip(0)  # ties come last first
    return _admit(order, order.argsort(), experts, limit, n_experts)


def admit_by_score_ordered_twice(experts, weights, limit, n_experts):
    order = weights.flatten().argsort(descending=True, stable=True)
    return _admit(order, order, experts, limit, n_experts)


def admit_by_score_in_order_of_tokens(experts, weights, limit, n_experts):
    return admit_by_score(experts, torch.ones_like(weights), limit, n_experts)


def admit_by_score_the_smallest_first(experts, weights, limit, n_experts):
    return admit_by_score(experts, -weights, limit, n_experts)


def admit_by_score_over_all_experts(experts, weights, limit, n_experts):
    order = weights.flatten().argsort(descending=True, stable=True)
    kept = experts.flatten().clone()
    kept[order[limit * n_experts :]] = n_experts
    return kept.view(experts.shape)


def admit_by_score_left_in_that_order(experts, weights, limit, n_experts):
    order = weights.flatten().argsort(descending=True, stable=True)
    return _admit(order, torch.arange(len(order)), experts, limit, n_experts)


def admit_by_score_with_places_from_zero(experts, weights, limit, n_experts):
    return admit_by_score(experts, weights, limit + 1, n_experts)


# --------------------------------------------------------------------------------- images_left_out
def images_left_out():
    lag = 1.4 * math.sqrt(128 * 2 * 7 / 8) / 2 / math.sqrt(2)
    return (64 - lag, 128 * 0.5**16)


ANSWERS: dict[str, tuple[Any, list]] = {
    "assemble": (
        assemble,
        [
            assemble_by_reshaping,
            assemble_down_the_columns,
            assemble_patches_on_their_side,
            assemble_on_its_side,
        ],
    ),
    "admit_by_score": (
        admit_by_score,
        [
            admit_by_score_with_an_unstable_sort,
            admit_by_score_from_the_other_end_of_a_stable_sort,
            admit_by_score_ordered_twice,
            admit_by_score_in_order_of_tokens,
            admit_by_score_the_smallest_first,
            admit_by_score_over_all_experts,
            admit_by_score_left_in_that_order,
            admit_by_score_with_places_from_zero,
        ],
    ),
    "images_left_out": (images_left_out, [(0, 0), (64, 64), (0, 56), (128, 0)]),
}
