"""Answers to the exercises of notebook 02: the right one, and plausible wrong ones."""

from collections.abc import Callable

import torch

from .nb01 import swiglu


# ---------------------------------------------------------------------------------- top_k_routing
def top_k_routing(logits, k, renormalize):
    ordered = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    experts, weights = ordered.indices[:, :k], ordered.values[:, :k]
    return experts, weights / weights.sum(dim=-1, keepdim=True) if renormalize else weights


def top_k_routing_with_ties_to_the_higher_index(logits, k, renormalize):
    experts, weights = top_k_routing(logits.flip(-1), k, renormalize)
    return logits.shape[1] - 1 - experts, weights


def top_k_routing_always_renormalized(logits, k, renormalize):
    return top_k_routing(logits, k, True)


def top_k_routing_in_order_of_index(logits, k, renormalize):
    experts, weights = top_k_routing(logits, k, renormalize)
    order = experts.argsort(dim=-1)
    return experts.gather(-1, order), weights.gather(-1, order)


# ------------------------------------------------------------------------------------ moe_forward
def moe_forward(x, router, gate_up, down, k, renormalize=True):
    experts, weights = top_k_routing(x @ router.T, k, renormalize)
    y = torch.zeros_like(x)
    for e in range(len(router)):
        served, slot = (experts == e).nonzero(as_tuple=True)
        answers = swiglu(x[served], gate_up[e], down[e]) * weights[served, slot, None]
        y = y.index_add(0, served, answers)
    return y


def moe_forward_without_renormalizing(x, router, gate_up, down, k):
    return moe_forward(x, router, gate_up, down, k, renormalize=False)


def moe_forward_unweighted(x, router, gate_up, down, k):
    experts, _ = top_k_routing(x @ router.T, k, True)
    return torch.stack(
        [sum(swiglu(t, gate_up[e], down[e]) for e in es) for t, es in zip(x, experts, strict=True)]
    )


def moe_forward_keeping_the_last_answer(x, router, gate_up, down, k):
    experts, weights = top_k_routing(x @ router.T, k, True)
    y = torch.zeros_like(x)
    for e in range(len(router)):
        served, slot = (experts == e).nonzero(as_tuple=True)
        y[served] = swiglu(x[served], gate_up[e], down[e]) * weights[served, slot, None]
    return y


# -------------------------------------------------------------------------------- parameter_count
def parameter_count(d_model, d_ff, n_experts, k):
    router, expert = n_experts * d_model, 3 * d_model * d_ff
    return router + n_experts * expert, router + k * expert


def parameter_count_without_router(d_model, d_ff, n_experts, k):
    return n_experts * 3 * d_model * d_ff, k * 3 * d_model * d_ff


def parameter_count_of_two_matrices(d_model, d_ff, n_experts, k):
    router = n_experts * d_model
    return router + n_experts * 2 * d_model * d_ff, router + k * 2 * d_model * d_ff


def parameter_count_of_an_active_share_of_all(d_model, d_ff, n_experts, k):
    total, _ = parameter_count(d_model, d_ff, n_experts, k)
    return total, total * k // n_experts


ANSWERS: dict[str, tuple[Callable, list[Callable]]] = {
    "top_k_routing": (
        top_k_routing,
        [
            top_k_routing_with_ties_to_the_higher_index,
            top_k_routing_always_renormalized,
            top_k_routing_in_order_of_index,
        ],
    ),
    "moe_forward": (
        moe_forward,
        [
            moe_forward_without_renormalizing,
            moe_forward_unweighted,
            moe_forward_keeping_the_last_answer,
        ],
    ),
    "parameter_count": (
        parameter_count,
        [
            parameter_count_without_router,
            parameter_count_of_two_matrices,
            parameter_count_of_an_active_share_of_all,
        ],
    ),
}
