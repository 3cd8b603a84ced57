"""Answers to the exercises of notebook 07: the right one, and plausible wrong ones."""

from collections.abc import Callable

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


# ------------------------------------------------------------------------------------------- fold
def fold(gate_up, down, scale):
    return gate_up.clone(), scale * down


def fold_into_both(gate_up, down, scale):
    return scale**0.5 * gate_up, scale**0.5 * down


def fold_into_the_first(gate_up, down, scale):
    return scale * gate_up, down


def fold_the_other_way(gate_up, down, scale):
    return gate_up, down / scale


def fold_nothing(gate_up, down, scale):
    return gate_up, down


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


def upcycle_ffn_sharing_memory(gate_up, down, n_experts, total):
    return gate_up.expand(n_experts, -1, -1), (down / total).expand(n_experts, -1, -1)


def upcycle_ffn_as_it_stands(gate_up, down, n_experts, total):
    return gate_up.expand(n_experts, -1, -1), down.expand(n_experts, -1, -1)


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
    "fold": (
        fold,
        [fold_into_both, fold_into_the_first, fold_the_other_way, fold_nothing],
    ),
    "upcycle_ffn": (
        upcycle_ffn,
        [
            upcycle_ffn_of_copies_alone,
            upcycle_ffn_scaling_both,
            upcycle_ffn_times_the_total,
            upcycle_ffn_over_the_experts,
            upcycle_ffn_sharing_memory,
            upcycle_ffn_as_it_stands,
        ],
    ),
}
