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


def top_k_routing_with_an_unstable_sort(logits, k, renormalize):
    scores = logits.softmax(dim=-1)
    experts = scores.argsort(dim=-1, descending=True)[:, :k]
    weights = scores.gather(-1, experts)
    return experts, weights / weights.sum(dim=-1, keepdim=True) if renormalize else weights


def top_k_routing_by_topk(logits, k, renormalize):
    weights, experts = logits.softmax(dim=-1).topk(k)
    return experts, weights / weights.sum(dim=-1, keepdim=True) if renormalize else weights


def top_k_routing_with_scores_of_other_experts(logits, k, renormalize):
    experts, weights = top_k_routing(logits, k, renormalize)
    return experts.sort(dim=-1).values, weights


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


def moe_forward_over_all_experts(x, router, gate_up, down, k):
    experts, weights = top_k_routing(x @ router.T, k, True)
    of_all = torch.zeros(len(x), len(router)).scatter(1, experts, weights)
    answers = torch.stack([swiglu(x, *pair) for pair in zip(gate_up, down, strict=True)])
    return torch.einsum("te,etd->td", of_all, answers)


def moe_forward_without_a_gradient_for_the_router(x, router, gate_up, down, k):
    return moe_forward(x, router.detach(), gate_up, down, k)


# ---------------------------------------------------------------------------------- mixtral_8x22b
def mixtral_8x22b():
    expert = 56 * 3 * 6144 * 16384
    rest = 56 * 2 * 6144 * 128 * (48 + 8) + 2 * 32000 * 6144
    return (8 * expert + rest) / 1e9, (2 * expert + rest) / 1e9


ANSWERS: dict[str, tuple[Callable, list]] = {
    "top_k_routing": (
        top_k_routing,
        [
            top_k_routing_with_ties_to_the_higher_index,
            top_k_routing_always_renormalized,
            top_k_routing_in_order_of_index,
            top_k_routing_with_an_unstable_sort,
            top_k_routing_by_topk,
            top_k_routing_with_scores_of_other_experts,
        ],
    ),
    "moe_forward": (
        moe_forward,
        [
            moe_forward_without_renormalizing,
            moe_forward_unweighted,
            moe_forward_keeping_the_last_answer,
            moe_forward_over_all_experts,
            moe_forward_without_a_gradient_for_the_router,
        ],
    ),
    "mixtral_8x22b": (mixtral_8x22b, [(176, 44), (141, 44), (135, 34), (46.7, 12.9)]),
}
