"""Answers to the exercises of notebook 04: the right one, and plausible wrong ones."""

from collections.abc import Callable

import torch


# ---------------------------------------------------------------------------------- padding_waste
def padding_waste(counts):
    places = len(counts) * counts.max().item()
    return 1 - counts.sum().item() / places if places else 0.0


def padding_waste_over_rows(counts):
    return len(counts) * counts.max().item() / max(counts.sum().item(), 1) - 1


def padding_waste_of_busy_experts(counts):
    return padding_waste(counts[counts > 0])


def padding_waste_as_a_count(counts):
    return float(len(counts) * counts.max().item() - counts.sum().item())


# ------------------------------------------------------------------------------------ permutation
def permutation(experts, n_experts):
    owners = experts.flatten()
    return owners.argsort(stable=True)[: (owners < n_experts).sum()]


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


# ---------------------------------------------------------------------------------------- combine
def combine(rows, order, weights):
    answers = rows * weights.flatten()[order, None]
    return rows.new_zeros(len(weights), rows.shape[1]).index_add(
        0, order // weights.shape[1], answers
    )


def combine_unweighted(rows, order, weights):
    return combine(rows, order, torch.ones_like(weights))


def combine_with_weights_in_the_order_of_rows(rows, order, weights):
    inverse = torch.zeros(weights.numel(), dtype=torch.long)
    inverse[order] = torch.arange(len(order))
    return combine(rows, order, weights.flatten()[inverse].view(weights.shape))


def combine_keeping_the_last_answer(rows, order, weights):
    y = rows.new_zeros(len(weights), rows.shape[1])
    y[order // weights.shape[1]] = rows * weights.flatten()[order, None]
    return y


def combine_renormalizing_what_is_left(rows, order, weights):
    kept = torch.zeros(weights.numel()).index_fill(0, order, 1).view(weights.shape) * weights
    return combine(rows, order, weights / kept.sum(dim=1, keepdim=True).clamp(min=1e-9))


ANSWERS: dict[str, tuple[Callable, list[Callable]]] = {
    "padding_waste": (
        padding_waste,
        [padding_waste_over_rows, padding_waste_of_busy_experts, padding_waste_as_a_count],
    ),
    "permutation": (
        permutation,
        [
            permutation_with_nobody_at_the_end,
            permutation_of_tokens,
            permutation_by_slot_first,
            permutation_backwards_within_an_expert,
        ],
    ),
    "combine": (
        combine,
        [
            combine_unweighted,
            combine_with_weights_in_the_order_of_rows,
            combine_keeping_the_last_answer,
            combine_renormalizing_what_is_left,
        ],
    ),
}
