"""Answers to the exercises of notebook 00: the right one, and plausible wrong ones."""

from typing import Any

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


def expert_counts_where_repeats_count_once(experts, n_experts):
    counts = torch.zeros(n_experts, dtype=torch.long)
    counts[experts] += 1
    return counts


# ------------------------------------------------------------------------------------ gate_weights
def gate_weights(logits):
    return logits.softmax(dim=-1)


def gate_weights_over_the_sequence(logits):
    return logits.softmax(dim=1)


def gate_weights_over_the_batch(logits):
    return logits.softmax(dim=0)


def gate_weights_over_everything(logits):
    return logits.flatten().softmax(dim=0).view(logits.shape)


def gate_weights_by_sigmoid(logits):
    scores = logits.sigmoid()
    return scores / scores.sum(dim=-1, keepdim=True)


# ------------------------------------------------------------------------------------ idle_experts
def idle_experts():
    return 64 * (1 - 1 / 64) ** 64


ANSWERS: dict[str, tuple[Any, list]] = {
    "expert_counts": (
        expert_counts,
        [
            expert_counts_without_idle_experts,
            expert_counts_of_first_choices,
            expert_counts_as_a_share,
            expert_counts_where_repeats_count_once,
        ],
    ),
    "gate_weights": (
        gate_weights,
        [
            gate_weights_over_the_sequence,
            gate_weights_over_the_batch,
            gate_weights_over_everything,
            gate_weights_by_sigmoid,
        ],
    ),
    "idle_experts": (idle_experts, [0, 1, 12, 32]),
}
