"""Answers to the exercises of notebook 06: the right one, and plausible wrong ones."""

from collections.abc import Callable

import torch
import torch.nn.functional as F


# ----------------------------------------------------------------------------------- balance_loss
def balance_loss(logits, k):
    scores = logits.softmax(dim=-1)
    f = F.one_hot(scores.topk(k).indices, logits.shape[1]).float().mean(dim=(0, 1))
    return logits.shape[1] * (f * scores.mean(dim=0)).sum()


def balance_loss_over_the_masked_softmax(logits, k):
    best = logits.topk(k)
    chosen = torch.full_like(logits, -torch.inf).scatter(1, best.indices, best.values)
    f = F.one_hot(best.indices, logits.shape[1]).float().mean(dim=(0, 1))
    return logits.shape[1] * (f * chosen.softmax(dim=-1).mean(dim=0)).sum()


def balance_loss_k_times(logits, k):
    return k * balance_loss(logits, k)


def balance_loss_of_first_choices(logits, k):
    scores = logits.softmax(dim=-1)
    f = F.one_hot(scores.argmax(dim=-1), logits.shape[1]).float().mean(dim=0)
    return logits.shape[1] * (f * scores.mean(dim=0)).sum()


# ------------------------------------------------------------------------------------ bias_update
def bias_update(bias, experts, rate):
    demand = torch.bincount(experts.flatten(), minlength=len(bias)).float()
    return bias + rate * (demand.mean() - demand).sign()


def bias_update_with_the_wrong_sign(bias, experts, rate):
    return bias_update(bias, experts, -rate)


def bias_update_in_proportion(bias, experts, rate):
    demand = torch.bincount(experts.flatten(), minlength=len(bias)).float()
    return bias + rate * (demand.mean() - demand)


def bias_update_with_the_mean_of_the_busy(bias, experts, rate):
    demand = torch.bincount(experts.flatten(), minlength=len(bias)).float()
    return bias + rate * (demand[demand > 0].mean() - demand).sign()


ANSWERS: dict[str, tuple[Callable, list[Callable]]] = {
    "balance_loss": (
        balance_loss,
        [
            balance_loss_over_the_masked_softmax,
            balance_loss_k_times,
            balance_loss_of_first_choices,
        ],
    ),
    "bias_update": (
        bias_update,
        [
            bias_update_with_the_wrong_sign,
            bias_update_in_proportion,
            bias_update_with_the_mean_of_the_busy,
        ],
    ),
}
