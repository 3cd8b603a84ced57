"""Answers to the exercises of notebook 00: the right one, and plausible wrong ones."""

from collections.abc import Callable

import torch


# ------------------------------------------------------------------------------------ expert_counts
def expert_counts(experts, n_experts):
    return torch.bincount(experts.flatten(), minlength=n_experts)


def expert_counts_without_idle_experts(experts, n_experts):
    return torch.bincount(experts.flatten())


def expert_counts_of_first_choices(experts, n_experts):
    return torch.bincount(experts[:, 0], minlength=n_experts)


def expert_counts_as_a_share(experts, n_experts):
    return expert_counts(experts, n_experts) / experts.numel()


ANSWERS: dict[str, tuple[Callable, list[Callable]]] = {
    "expert_counts": (
        expert_counts,
        [
            expert_counts_without_idle_experts,
            expert_counts_of_first_choices,
            expert_counts_as_a_share,
        ],
    ),
}
