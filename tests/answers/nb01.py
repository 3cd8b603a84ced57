"""Answers to the exercises of notebook 01: the right one, and plausible wrong ones."""

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


# --------------------------------------------------------------------------------------- ffn_cost
def ffn_cost(d_model, d_ff, gated):
    parameters = (3 if gated else 2) * d_model * d_ff
    return parameters, 2 * parameters


def ffn_cost_without_additions(d_model, d_ff, gated):
    parameters = (3 if gated else 2) * d_model * d_ff
    return parameters, parameters


def ffn_cost_never_gated(d_model, d_ff, gated):
    return 2 * d_model * d_ff, 4 * d_model * d_ff


def ffn_cost_with_backward(d_model, d_ff, gated):
    parameters = (3 if gated else 2) * d_model * d_ff
    return parameters, 6 * parameters


# --------------------------------------------------------------------------------- balance_tokens
def balance_tokens(flops_per_second, bytes_per_second, bytes_per_weight):
    return flops_per_second * bytes_per_weight / (2 * bytes_per_second)


def balance_tokens_without_additions(flops_per_second, bytes_per_second, bytes_per_weight):
    return flops_per_second * bytes_per_weight / bytes_per_second


def balance_tokens_of_bytes(flops_per_second, bytes_per_second, bytes_per_weight):
    return flops_per_second / (2 * bytes_per_second)


def balance_tokens_upside_down(flops_per_second, bytes_per_second, bytes_per_weight):
    return 2 * bytes_per_second / (flops_per_second * bytes_per_weight)


ANSWERS: dict[str, tuple[Callable, list[Callable]]] = {
    "swiglu": (
        swiglu,
        [swiglu_up_first, swiglu_with_gelu, swiglu_bent_twice, swiglu_interleaved],
    ),
    "ffn_cost": (
        ffn_cost,
        [ffn_cost_without_additions, ffn_cost_never_gated, ffn_cost_with_backward],
    ),
    "balance_tokens": (
        balance_tokens,
        [balance_tokens_without_additions, balance_tokens_of_bytes, balance_tokens_upside_down],
    ),
}
