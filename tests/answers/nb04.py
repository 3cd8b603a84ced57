"""Answers to the exercises of notebook 04: the right one, and plausible wrong ones."""

from typing import Any

import numpy as np
import torch


# --------------------------------------------------------------------------------- cost_of_moving
def cost_of_moving():
    return 2 * 8192 / (3 * 768)


# ------------------------------------------------------------------------------------ permutation
def permutation(experts, n_experts):
    owners = experts.flatten()
    return owners.argsort(stable=True)[: (owners < n_experts).sum()]


def permutation_by_an_unstable_sort(experts, n_experts):
    slots = experts.flatten().numpy()
    return torch.from_numpy(np.argsort(slots)[: (slots < n_experts).sum()])


def permutation_with_nobody_at_the_end(experts, n_experts):
    return experts.flatten().argsort(stable=True)


def permutation_of_tokens(experts, n_experts):
    return permutation(experts, n_experts) // experts.shape[1]


def permutation_by_slot_first(experts, n_experts):
    tokens, k = experts.shape
    order = permutation(experts.T, n_experts)
    return order % tokens * k + order // tokens


def permutation_backwards_within_an_expert(experts, n_experts):
    return experts.numel() - 1 - permutation(experts.flatten().flip(0)[:, None], n_experts)


def permutation_of_slots_that_stay_where_they_are(experts, n_experts):
    return (experts.flatten() < n_experts).nonzero()[:, 0]


# ---------------------------------------------------------------------------------------- combine
def weighted(rows, order, weights):
    """The rows of each token added up, each times the weight of its slot."""
    shares = weights.flatten()[order, None]
    return rows.new_zeros(len(weights), rows.shape[1]).index_add(
        0, order // weights.shape[1], rows * shares
    )


def chosen(scores, experts):
    """The score of each slot; nobody has 0."""
    return torch.cat([scores, scores.new_zeros(len(scores), 1)], dim=1).gather(1, experts)


def combine(rows, order, scores, experts):
    return weighted(rows, order, chosen(scores, experts))


def combine_by_place_among_all_scores(rows, order, scores, experts):
    shares = scores.flatten()[order, None]
    tokens = order // experts.shape[1]
    return rows.new_zeros(len(scores), rows.shape[1]).index_add(0, tokens, rows * shares)


def combine_with_the_first_scores(rows, order, scores, experts):
    return weighted(rows, order, scores[:, : experts.shape[1]])


def combine_with_sorted_scores(rows, order, scores, experts):
    return weighted(rows, order, scores.topk(experts.shape[1]).values)


def combine_unweighted(rows, order, scores, experts):
    return weighted(rows, order, torch.ones(experts.shape))


def combine_renormalizing(rows, order, scores, experts):
    shares = chosen(scores, experts)
    return weighted(rows, order, shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-9))


def combine_keeping_the_last_row(rows, order, scores, experts):
    y, shares = rows.new_zeros(len(scores), rows.shape[1]), chosen(scores, experts)
    y[order // experts.shape[1]] = rows * shares.flatten()[order, None]
    return y


def combine_with_detached_scores(rows, order, scores, experts):
    return combine(rows, order, scores.detach(), experts)


def combine_by_the_inverse_permutation(rows, order, scores, experts):
    by_slot = rows[order.argsort()].unflatten(0, experts.shape)
    return (by_slot * chosen(scores, experts)[..., None]).sum(dim=1)


ANSWERS: dict[str, tuple[Any, list[Any]]] = {
    "cost_of_moving": (cost_of_moving, [1.0, 3.6, 10.7, 14.2]),
    "permutation": (
        permutation,
        [
            permutation_by_an_unstable_sort,
            permutation_with_nobody_at_the_end,
            permutation_of_tokens,
            permutation_by_slot_first,
            permutation_backwards_within_an_expert,
            permutation_of_slots_that_stay_where_they_are,
        ],
    ),
    "combine": (
        combine,
        [
            combine_by_place_among_all_scores,
            combine_with_the_first_scores,
            combine_with_sorted_scores,
            combine_unweighted,
            combine_renormalizing,
            combine_keeping_the_last_row,
            combine_with_detached_scores,
            combine_by_the_inverse_permutation,
        ],
    ),
}
