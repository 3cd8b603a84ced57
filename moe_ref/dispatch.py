"""Dispatch: bring the tokens of each expert together, and take the answers home.

    token   slot 0  slot 1          row   expert  from token
      a        2       0             0      0         a
      b        0       1     plan    1      0         b
      c        2       1    ----->   2      1         b
                                     3      1         c
                                     4      2         a
                                     5      2         c

`permute` makes the rows on the right, an expert works on its run of rows, `combine` adds the
answers up at the left. Slots that nobody serves get no row, so no work is done for them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from .routing import Routing


@dataclass(frozen=True, eq=False)
class Plan:
    """Where each row comes from, rows being grouped by expert, in expert order."""

    order: Int[Tensor, " rows"]  # slot of each row, counted as token * slots + slot
    tokens: Int[Tensor, " rows"]  # token of each row
    counts: Int[Tensor, " n_experts"]  # rows of each expert


def plan(routing: Routing) -> Plan:
    """The permutation of a routing; within an expert, rows keep the order of their tokens."""
    counts = routing.counts
    # A stable sort by expert puts the slots of expert n_experts, nobody, last: cut them off.
    order = routing.experts.flatten().argsort(stable=True)[: int(counts.sum())]
    slots = routing.experts.shape[-1]
    return Plan(order=order, tokens=order // slots, counts=counts)


def permute(x: Float[Tensor, "tokens d_model"], plan: Plan) -> Float[Tensor, "rows d_model"]:
    """Copy each token to the rows that the plan gives it."""
    return x.index_select(0, plan.tokens)


def combine(
    rows: Float[Tensor, "rows d_model"], plan: Plan, routing: Routing
) -> Float[Tensor, "tokens d_model"]:
    """Take each row back to its slot and add up the slots of a token by their weights.

    The sum is taken in float32 at least, in the order of the slots: the same bits every time.
    A token that nobody serves gets 0.
    """
    return WeightedSum.apply(rows, routing.weights, plan.order).to(rows.dtype)


class WeightedSum(torch.autograd.Function):
    """y[t] = sum over slots s of weights[t, s] * rows[the row of slot t, s].

    Slot by slot, so that no tensor of the size of all rows is made; autograd, left to itself,
    would make one for each slot. The gradient of a row is weights[t, s] * grad[t], that of a
    weight is rows[...] . grad[t].
    """

    @staticmethod
    def forward(ctx, rows, weights, order):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows, weights, order)
        dtype = torch.promote_types(rows.dtype, weights.dtype)
        y = torch.zeros(len(weights), rows.shape[-1], dtype=dtype, device=rows.device)
        if len(rows) == 0:
            return y
        # Where each slot's row stands; a slot that nobody serves has none, and is cleared.
        served = torch.zeros_like(weights, dtype=torch.bool).view(-1)
        served[order] = True
        place = torch.zeros_like(served, dtype=torch.long)
        place[order] = torch.arange(len(order), device=order.device)
        for slot in range(weights.shape[1]):
            answers = rows.index_select(0, place.view(weights.shape)[:, slot])
            if len(order) < weights.numel():
                answers.masked_fill_(~served.view(weights.shape)[:, slot, None], 0)
            y.addcmul_(answers, weights[:, slot, None])
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, weights, order = ctx.saved_tensors
        grad = grad.index_select(0, order // weights.shape[1])
        share = weights.flatten().index_select(0, order)[:, None]
        products = (grad * rows).sum(dim=-1).to(weights.dtype)
        by_weight = torch.zeros_like(weights).view(-1).index_copy(0, order, products)
        return (grad * share).to(rows.dtype), by_weight.view(weights.shape), None


def one_hot(routing: Routing) -> Float[Tensor, "tokens n_experts capacity"]:
    """GShard's dispatch tensor: 1 where a token takes a place of an expert, in token order.

    `capacity` is the load of the busiest expert. The tensor has tokens * n_experts * capacity
    entries, of which tokens * slots are not 0: that is what the sorted rows do without.
    Source: Lepikhin et al. 2020 (2006.16668), algorithm 1.
    """
    slots = F.one_hot(routing.experts, routing.n_experts + 1)[..., :-1]  # last column: nobody
    chosen = slots.sum(dim=1)
    place = chosen.cumsum(dim=0) - chosen  # tokens before this one at the same expert
    capacity = int(routing.counts.max())
    taken = F.one_hot(place.clamp(max=max(capacity - 1, 0)), max(capacity, 1))
    return (taken * chosen[..., None]).float()


def by_einsum(
    x: Float[Tensor, "tokens d_model"],
    routing: Routing,
    experts: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "tokens d_model"]:
    """Dispatch, experts and combine as two einsums around them; a second opinion, not for speed.

    `experts(rows, counts)` is called with the same number of rows, filled up with zeros, for each.
    """
    places = one_hot(routing).to(x.dtype)
    rows = einsum(
        places, x, "tokens n_experts capacity, tokens d_model -> n_experts capacity d_model"
    )
    n_experts, capacity, _ = rows.shape
    counts = torch.full((n_experts,), capacity, device=x.device)
    answers = experts(rows.flatten(0, 1), counts).unflatten(0, (n_experts, capacity))
    # The weight of each token at each expert: its slot's, where it has one.
    share = routing.weights.new_zeros(len(x), n_experts + 1)
    share = share.scatter_add(1, routing.experts, routing.weights)[:, :-1].to(x.dtype)
    return einsum(
        places,
        share,
        answers,
        "tokens n_experts capacity, tokens n_experts, n_experts capacity d_model -> tokens d_model",
    )
