"""Answers to the exercises of notebook 08: the right one, and plausible wrong ones."""

import math
from typing import Any

import torch


# -------------------------------------------------------------------------------- accidental_bits
def accidental_bits():
    return (64 - 1) * (8 - 1) / (2 * 2000 * math.log(2))


# --------------------------------------------------------------------------------------- renumber
def renumber(experts, order):
    return torch.where(experts < 0, experts, order.argsort()[experts])


def renumber_as_it_stands(experts, order):
    return order[experts]


def renumber_the_wrong_way(experts, order):
    return torch.where(experts < 0, experts, order[experts])


def renumber_nobody_too(experts, order):
    return order.argsort()[experts]


def renumber_nobody_as_expert_0(experts, order):
    return order.argsort()[experts.clamp(min=0)]


def renumber_nobody_as_one_more(experts, order):
    return torch.where(experts < 0, len(order), order.argsort()[experts])


# ----------------------------------------------------------------------------------- route_around
def route_around(logits, k, dead):
    values, experts = logits.masked_fill(dead, -math.inf).sort(dim=-1, descending=True, stable=True)
    values, experts = values[:, :k], experts[:, :k]
    empty = values == -math.inf
    weights = values.softmax(dim=-1).masked_fill(empty, 0)
    return experts.masked_fill(empty, logits.shape[1]), weights


def route_around_by_topk(logits, k, dead):
    values, experts = logits.masked_fill(dead, -math.inf).topk(k)
    empty = values == -math.inf
    weights = values.softmax(dim=-1).masked_fill(empty, 0)
    return experts.masked_fill(empty, logits.shape[1]), weights


def route_around_by_a_logit_of_zero(logits, k, dead):
    values, experts = logits.masked_fill(dead, 0).sort(dim=-1, descending=True, stable=True)
    return experts[:, :k], values[:, :k].softmax(dim=-1)


def route_around_with_new_numbers(logits, k, dead):
    return route_around(logits[:, ~dead], k, torch.zeros(int((~dead).sum()), dtype=torch.bool))


def route_around_without_a_next_best(logits, k, dead):
    values, experts = logits.sort(dim=-1, descending=True, stable=True)
    lost = dead[experts[:, :k]]
    weights = values[:, :k].softmax(dim=-1).masked_fill(lost, 0)
    return experts[:, :k].masked_fill(lost, logits.shape[1]), weights


def route_around_without_renormalising(logits, k, dead):
    experts, weights = route_around(logits, k, dead)
    shares = torch.cat([logits.softmax(dim=-1), torch.zeros(len(logits), 1)], dim=1)
    return experts, shares.gather(1, experts)


def route_around_that_names_the_dead(logits, k, dead):
    values, experts = logits.masked_fill(dead, -math.inf).sort(dim=-1, descending=True, stable=True)
    return experts[:, :k], values[:, :k].softmax(dim=-1).nan_to_num()


def route_around_until_all_are_dead(logits, k, dead):
    values, experts = logits.masked_fill(dead, -math.inf).sort(dim=-1, descending=True, stable=True)
    values, experts = values[:, :k], experts[:, :k]
    experts = experts.masked_fill(values == -math.inf, logits.shape[1])
    return experts, values.softmax(dim=-1)


ANSWERS: dict[str, tuple[Any, list]] = {
    "accidental_bits": (accidental_bits, [0, 0.03, 1, 3]),
    "renumber": (
        renumber,
        [
            renumber_as_it_stands,
            renumber_the_wrong_way,
            renumber_nobody_too,
            renumber_nobody_as_expert_0,
            renumber_nobody_as_one_more,
        ],
    ),
    "route_around": (
        route_around,
        [
            route_around_by_topk,
            route_around_by_a_logit_of_zero,
            route_around_with_new_numbers,
            route_around_without_a_next_best,
            route_around_without_renormalising,
            route_around_that_names_the_dead,
            route_around_until_all_are_dead,
        ],
    ),
}
