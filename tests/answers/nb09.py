"""Answers to the exercises of notebook 09: the right one, and plausible wrong ones."""

from collections.abc import Callable

import torch
import torch.nn.functional as F


# --------------------------------------------------------------------------- 09, patchify
def patchify(images, size):
    n, height, width = images.shape
    grid = images.view(n, height // size, size, width // size, size)
    return grid.transpose(2, 3).reshape(n, -1, size * size)


def patchify_by_reshaping(images, size):
    return images.reshape(len(images), -1, size * size)


def patchify_down_the_columns(images, size):
    n, height, width = images.shape
    grid = images.view(n, height // size, size, width // size, size)
    return grid.permute(0, 3, 1, 2, 4).reshape(n, -1, size * size)


def patchify_on_its_side(images, size):
    return patchify(images, size).unflatten(-1, (size, size)).mT.flatten(-2)


# --------------------------------------------------------------------- 09, admit_by_score
def admit_by_score(experts, weights, limit, n_experts):
    order = weights.flatten().argsort(descending=True, stable=True)
    ranked = experts.flatten()[order]
    place = F.one_hot(ranked, n_experts + 1).cumsum(dim=0).gather(1, ranked[:, None])[:, 0]
    kept = torch.empty_like(ranked)
    kept[order] = ranked.masked_fill(place > limit, n_experts)
    return kept.view(experts.shape)


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
    return admit_by_score(experts, weights, limit, n_experts).flatten()[order].view(experts.shape)


# ------------------------------------------------------------------------- 09, multi_gate
def multi_gate(x, answers, gates):
    shares = torch.einsum("nd,ted->tne", x, gates).softmax(dim=-1)
    return torch.einsum("tne,neh->tnh", shares, answers)


def multi_gate_with_one_gate(x, answers, gates):
    return multi_gate(x, answers, gates[:1].expand_as(gates))


def multi_gate_with_a_softmax_over_tasks(x, answers, gates):
    shares = torch.einsum("nd,ted->tne", x, gates).softmax(dim=0)
    return torch.einsum("tne,neh->tnh", shares, answers)


def multi_gate_without_softmax(x, answers, gates):
    return torch.einsum("nd,ted,neh->tnh", x, gates, answers)


def multi_gate_of_the_best_expert(x, answers, gates):
    best = torch.einsum("nd,ted->tne", x, gates).argmax(dim=-1)
    return torch.stack([answers[torch.arange(len(x)), chosen] for chosen in best])


# exercise: (a right answer, plausible wrong ones)


# exercise: (a right answer, plausible wrong ones)
ANSWERS: dict[str, tuple[Callable, list[Callable]]] = {
    "patchify": (
        patchify,
        [patchify_by_reshaping, patchify_down_the_columns, patchify_on_its_side],
    ),
    "admit_by_score": (
        admit_by_score,
        [
            admit_by_score_in_order_of_tokens,
            admit_by_score_the_smallest_first,
            admit_by_score_over_all_experts,
            admit_by_score_left_in_that_order,
        ],
    ),
    "multi_gate": (
        multi_gate,
        [
            multi_gate_with_one_gate,
            multi_gate_with_a_softmax_over_tasks,
            multi_gate_without_softmax,
            multi_gate_of_the_best_expert,
        ],
    ),
}
