"""Answers to the exercises of notebook 08: the right one, and plausible wrong ones."""

import itertools
import math
from collections.abc import Callable

import torch


# ----------------------------------------------------------------- 08, mutual_information
def entropy(*labels):
    joint = torch.stack(labels).unique(dim=1, return_counts=True)[1] / len(labels[0])
    return torch.special.entr(joint).sum() / math.log(2)


def mutual_information(a, b):
    return entropy(a) + entropy(b) - entropy(a, b)


def mutual_information_in_nats(a, b):
    return mutual_information(a, b) * math.log(2)


def mutual_information_as_a_plain_number(a, b):
    return mutual_information(a, b).item()


def mutual_information_of_the_joint_alone(a, b):
    return entropy(a, b)


def mutual_information_as_what_is_left(a, b):
    return entropy(a, b) - entropy(a)


def mutual_information_as_a_share(a, b):
    return mutual_information(a, b) / entropy(a).clamp(min=1e-9)


# ---------------------------------------------------------------------- 08, route_without
def route_without(logits, k, expert):
    ruled = logits.clone()
    ruled[:, expert] = -math.inf
    values, experts = ruled.sort(dim=-1, descending=True, stable=True)
    return experts[:, :k], values[:, :k].softmax(dim=-1)


def route_without_renaming_back(logits, k, expert):
    left = torch.cat([logits[:, :expert], logits[:, expert + 1 :]], dim=1)
    values, experts = left.sort(dim=-1, descending=True, stable=True)
    return experts[:, :k], values[:, :k].softmax(dim=-1)


def route_without_by_a_logit_of_zero(logits, k, expert):
    ruled = logits.clone()
    ruled[:, expert] = 0
    values, experts = ruled.sort(dim=-1, descending=True, stable=True)
    return experts[:, :k], values[:, :k].softmax(dim=-1)


def route_without_renormalising(logits, k, expert):
    experts, _ = route_without(logits, k, expert)
    return experts, logits.softmax(dim=-1).gather(-1, experts)


def route_without_a_next_best(logits, k, expert):
    values, experts = logits.sort(dim=-1, descending=True, stable=True)
    weights = values[:, :k].softmax(dim=-1)
    return experts[:, :k], weights.masked_fill(experts[:, :k] == expert, 0)


# -------------------------------------------------------------------------- 08, agreement
def agreement(a, b, n_experts):
    return max(
        (torch.tensor(order)[a] == b).float().mean()
        for order in itertools.permutations(range(n_experts))
    )


def agreement_by_name(a, b, n_experts):
    return (a == b).float().mean()


def agreement_with_every_favourite(a, b, n_experts):
    meets = torch.bincount(a * n_experts + b, minlength=n_experts**2).view(n_experts, -1)
    return meets.max(dim=1).values.sum() / len(a)


def agreement_greedy(a, b, n_experts):
    meets, total = torch.bincount(a * n_experts + b, minlength=n_experts**2), 0
    meets = meets.view(n_experts, -1)
    for _ in range(n_experts):
        best = int(meets.argmax())
        total += meets.flatten()[best].item()
        meets[best // n_experts] = meets[:, best % n_experts] = -1
    return total / len(a)


# exercise: (a right answer, plausible wrong ones)
ANSWERS: dict[str, tuple[Callable, list[Callable]]] = {
    "mutual_information": (
        mutual_information,
        [
            mutual_information_in_nats,
            mutual_information_of_the_joint_alone,
            mutual_information_as_what_is_left,
            mutual_information_as_a_share,
        ],
    ),
    "route_without": (
        route_without,
        [
            route_without_renaming_back,
            route_without_by_a_logit_of_zero,
            route_without_renormalising,
            route_without_a_next_best,
        ],
    ),
    "agreement": (
        agreement,
        [agreement_by_name, agreement_with_every_favourite, agreement_greedy],
    ),
}
