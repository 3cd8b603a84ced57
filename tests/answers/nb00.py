"""Answers to the exercises of notebook 00: the right one, and plausible wrong ones."""

from collections.abc import Callable

import torch


# ------------------------------------------------------------------------------------------- load
def load(experts, n_experts):
    return torch.bincount(experts.flatten(), minlength=n_experts)


def load_without_idle_experts(experts, n_experts):
    return torch.bincount(experts.flatten())


def load_of_first_choices(experts, n_experts):
    return torch.bincount(experts[:, 0], minlength=n_experts)


def load_as_a_share(experts, n_experts):
    return load(experts, n_experts) / experts.numel()


ANSWERS: dict[str, tuple[Callable, list[Callable]]] = {
    "load": (load, [load_without_idle_experts, load_of_first_choices, load_as_a_share]),
}
