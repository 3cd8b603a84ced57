"""Answers to the exercises of notebook 01: the right one, and plausible wrong ones."""

import math
from collections.abc import Callable

import torch.nn.functional as F


# ----------------------------------------------------------------------------------------- swiglu
def swiglu(x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.T


def swiglu_up_first(x, gate_up, down):
    up, gate = (x @ gate_up.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.T


def swiglu_with_gelu(x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (F.gelu(gate) * up) @ down.T


def swiglu_bent_twice(x, gate_up, down):
    gate, up = F.silu(x @ gate_up.T).chunk(2, dim=-1)
    return (gate * up) @ down.T


def swiglu_interleaved(x, gate_up, down):
    gate, up = x @ gate_up[::2].T, x @ gate_up[1::2].T
    return (F.silu(gate) * up) @ down.T


# ----------------------------------------------------------------------------------- backward_work
def backward_work():
    weights_frozen = 3 / 3  # products for gradients of inputs, over products of the forward pass
    input_without = (3 + 1) / 3  # all weights, and the hidden features
    return weights_frozen, input_without


# --------------------------------------------------------------------------------- balance_tokens
def balance_tokens(d_in, d_out, peak, bandwidth, size):
    compute = 2 * d_in * d_out / peak
    move = size * (d_in + d_out) / bandwidth
    return size * d_in * d_out / bandwidth / (compute - move) if compute > move else math.inf


def balance_tokens_without_additions(d_in, d_out, peak, bandwidth, size):
    return balance_tokens(d_in, d_out, 2 * peak, bandwidth, size)


def balance_tokens_of_bytes(d_in, d_out, peak, bandwidth, size):
    return balance_tokens(d_in, d_out, peak, bandwidth, 1)


def balance_tokens_upside_down(d_in, d_out, peak, bandwidth, size):
    return 1 / balance_tokens(d_in, d_out, peak, bandwidth, size)


def balance_tokens_without_their_own_bytes(d_in, d_out, peak, bandwidth, size):
    return peak * size / (2 * bandwidth)


def balance_tokens_without_results(d_in, d_out, peak, bandwidth, size):
    return size * d_in * d_out / (2 * d_in * d_out * bandwidth / peak - size * d_in)


def balance_tokens_below_zero(d_in, d_out, peak, bandwidth, size):
    return size * d_in * d_out / (2 * d_in * d_out * bandwidth / peak - size * (d_in + d_out))


ANSWERS: dict[str, tuple[Callable, list]] = {
    "swiglu": (
        swiglu,
        [swiglu_up_first, swiglu_with_gelu, swiglu_bent_twice, swiglu_interleaved],
    ),
    "backward_work": (backward_work, [(0, 1), (2, 2), (1, 1), (0.5, 1.33)]),
    "balance_tokens": (
        balance_tokens,
        [
            balance_tokens_without_additions,
            balance_tokens_of_bytes,
            balance_tokens_upside_down,
            balance_tokens_without_their_own_bytes,
            balance_tokens_without_results,
            balance_tokens_below_zero,
        ],
    ),
}
