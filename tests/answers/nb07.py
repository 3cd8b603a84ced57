"""Answers to the exercises of notebook 07: the right one, and plausible wrong ones."""

import math
from collections.abc import Callable

import numpy as np
import torch


# ----------------------------------------------------------------------------------------- rotary
def rotary(x, theta):
    m = x.shape[1]
    angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(0, m, 2) / m)
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def rotary_of_neighbours(x, theta):
    order = torch.arange(x.shape[1]).view(-1, 2).T.flatten()
    return rotary(x[:, order], theta)[:, order.argsort()]


def rotary_from_position_one(x, theta):
    return rotary(torch.cat([x[:1], x]), theta)[1:]


def rotary_the_other_way(x, theta):
    half = x.shape[1] // 2
    return rotary(x.roll(half, dims=1), theta).roll(half, dims=1)


def rotary_at_half_the_exponent(x, theta):
    return rotary(x, theta**0.5)


# --------------------------------------------------------------------------------- steps_to_reach
def steps_to_reach(steps, losses, target):
    if losses[0] <= target:
        return float(steps[0])
    for i in range(1, len(steps)):
        if losses[i] <= target:
            part = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
            return steps[i - 1] + part * (steps[i] - steps[i - 1])
    return math.inf


def steps_to_reach_at_an_evaluation(steps, losses, target):
    return next((float(s) for s, loss in zip(steps, losses) if loss <= target), math.inf)


def steps_to_reach_in_a_falling_list(steps, losses, target):
    if min(losses) > target:
        return math.inf
    return float(np.interp(-target, [-loss for loss in losses], steps))


def steps_to_reach_or_the_last(steps, losses, target):
    return min(steps_to_reach(steps, losses, target), float(steps[-1]))


def steps_to_reach_for_good(steps, losses, target):
    return steps_to_reach(steps[-2:], losses[-2:], target)


# ------------------------------------------------------------------------------------ upcycle_ffn
def upcycle_ffn(gate_up, down, n_experts, total):
    return gate_up.repeat(n_experts, 1, 1), (down / total).repeat(n_experts, 1, 1)


def upcycle_ffn_of_copies_alone(gate_up, down, n_experts, total):
    return upcycle_ffn(gate_up, down, n_experts, 1.0)


def upcycle_ffn_scaling_both(gate_up, down, n_experts, total):
    return upcycle_ffn(gate_up / total, down, n_experts, total)


def upcycle_ffn_times_the_total(gate_up, down, n_experts, total):
    return upcycle_ffn(gate_up, down, n_experts, 1 / total)


def upcycle_ffn_over_the_experts(gate_up, down, n_experts, total):
    return upcycle_ffn(gate_up, down, n_experts, float(n_experts))


ANSWERS: dict[str, tuple[Callable, list[Callable]]] = {
    "rotary": (
        rotary,
        [
            rotary_of_neighbours,
            rotary_from_position_one,
            rotary_the_other_way,
            rotary_at_half_the_exponent,
        ],
    ),
    "steps_to_reach": (
        steps_to_reach,
        [
            steps_to_reach_at_an_evaluation,
            steps_to_reach_in_a_falling_list,
            steps_to_reach_or_the_last,
            steps_to_reach_for_good,
        ],
    ),
    "upcycle_ffn": (
        upcycle_ffn,
        [
            upcycle_ffn_of_copies_alone,
            upcycle_ffn_scaling_both,
            upcycle_ffn_times_the_total,
            upcycle_ffn_over_the_experts,
        ],
    ),
}
