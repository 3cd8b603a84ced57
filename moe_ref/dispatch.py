"""Dispatch: move tokens to their experts, and the outputs back to their tokens.

A dispatch is a function `(x, routing, experts) -> y`, and all of them give the same y:

| dispatch | how |
|---|---|
| `sorted_rows` | copies the tokens of each expert side by side; a slot of nobody has no row |
| `one_hot_einsum` | multiplies by a large tensor of zeros and ones; for small batches |

    token   slot 0  slot 1          row   expert  from token
      a        2       0             0      0         a
      b        0       1     plan    1      0         b
      c        2       1    ----->   2      1         b
                                     3      1         c
                                     4      2         a
                                     5      2         c

`permute` makes the rows on the right, each expert works on its own, and `combine` adds the outputs
up by token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from .routing import Routing

Dispatch = Callable[[Tensor, Routing, Callable[[Tensor, Tensor], Tensor]], Tensor]


def sorted_rows(
    x: Float[Tensor, "tokens d_model"],
    routing: Routing,
    experts: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "tokens d_model"]:
    """Sort the assignments by expert, let each expert work on its rows, add up by token.

    Args:
        x: the tokens.
        routing: which experts serve them.
        experts: called as `experts(rows, counts)`; an `Experts`.

    Returns:
        The weighted sum of the experts' outputs for each token; 0 for a token that nobody serves.

    Example:
        >>> x, experts = torch.randn(6, 4), Experts(3, d_model=4, d_ff=8)
        >>> routing = TopKRouter(d_model=4, n_experts=3, k=2)(x)
        >>> y = sorted_rows(x, routing, experts)
        >>> torch.allclose(y, one_hot_einsum(x, routing, experts), atol=1e-6)
        True
    """
    moves = plan(routing)
    return combine(experts(permute(x, moves), moves.counts), moves, routing)


@dataclass(frozen=True, eq=False)
class Plan:
    """Where each row comes from; the rows are grouped by expert, in expert order.

    Example:
        >>> routing = TopKRouter(d_model=4, n_experts=3, k=2)(torch.randn(5, 4))
        >>> moves = plan(routing)
        >>> routing.experts.flatten()[moves.order].tolist() == sorted(routing.experts.flatten())
        True
    """

    order: Int[Tensor, " rows"]  # slot of each row, counted as token * slots + slot
    tokens: Int[Tensor, " rows"]  # token of each row
    counts: Int[Tensor, " n_experts"]  # rows of each expert
    served: Int[Tensor, ""] | None = None  # rows that an expert serves; None: all


def plan(routing: Routing) -> Plan:
    """The permutation of a routing; within an expert, rows keep the order of their tokens.

    In a graph, or on the meta device, the number of rows can't depend on the numbers in a tensor:
    there the slots that nobody serves have rows too, of zeros, at the end.
    """
    counts = routing.counts
    # A stable sort by expert puts the slots of expert n_experts, nobody, last.
    order = routing.experts.flatten().argsort(stable=True)
    served = counts.sum()
    if not (torch.compiler.is_compiling() or counts.is_meta):
        order = order[: int(served)]
        return Plan(order, order // routing.experts.shape[-1], counts)
    nobody = (len(order) - served)[None]  # the last expert works on the zeros too
    counts = torch.cat([counts[:-1], counts[-1:] + nobody])
    return Plan(order, order // routing.experts.shape[-1], counts, served)


def permute(x: Float[Tensor, "tokens d_model"], plan: Plan) -> Float[Tensor, "rows d_model"]:
    """Copy each token to the rows that the plan gives it."""
    return only_served(x.index_select(0, plan.tokens), plan)


def combine(
    rows: Float[Tensor, "rows d_model"], plan: Plan, routing: Routing
) -> Float[Tensor, "tokens d_model"]:
    """The weighted sum of each token's rows; 0 for a token that nobody serves.

    It is taken in float32 at least, in the order of the slots: the same bits every time.
    """
    if plan.served is None:
        add_up = WeightedSum.apply if torch.is_grad_enabled() else weighted_sum
        return add_up(rows, routing.weights, plan.order).to(rows.dtype)
    home = plan.order.argsort()  # plain operations: a graph makes its own backward
    by_slot = only_served(rows, plan).index_select(0, home).unflatten(0, routing.weights.shape)
    return (by_slot * routing.weights[..., None]).sum(dim=1).to(rows.dtype)


def only_served(rows: Float[Tensor, "rows d_model"], plan: Plan) -> Float[Tensor, "rows d_model"]:
    """The rows, those that nobody serves set to 0, which stops their gradient too."""
    if plan.served is None:
        return rows
    place = torch.arange(len(plan.order), device=rows.device)
    return rows.masked_fill((place >= plan.served)[:, None], 0)


def weighted_sum(
    rows: Float[Tensor, "rows d_model"],
    weights: Float[Tensor, "tokens slots"],
    order: Int[Tensor, " rows"],
) -> Float[Tensor, "tokens d_model"]:
    """y[t] = sum over slots s of weights[t, s] * rows[the row of slot t, s].

    It goes slot by slot, and so makes no tensor of the size of all rows.
    """
    dtype = torch.promote_types(rows.dtype, weights.dtype)
    y = torch.zeros(len(weights), rows.shape[-1], dtype=dtype, device=rows.device)
    if len(rows) == 0:
        return y
    # The row of each slot; one that nobody serves has none, and adds 0.
    place = torch.zeros(weights.numel(), dtype=torch.long, device=order.device)
    place.scatter_(0, order, torch.arange(len(order), device=order.device))
    dropped = None
    if len(order) < weights.numel():
        dropped = torch.ones_like(place, dtype=torch.bool).scatter_(0, order, False)
        dropped = dropped.view_as(weights)[..., None]
    shares = weights[..., None].unbind(1)
    for slot, where in enumerate(place.view_as(weights).unbind(1)):
        outputs = rows.index_select(0, where)
        if dropped is not None:
            outputs.masked_fill_(dropped[:, slot], 0)
        y.addcmul_(outputs, shares[slot])
    return y


class WeightedSum(torch.autograd.Function):
    """`weighted_sum` with its gradients; autograd, left to itself, would keep a tensor per slot.

    The gradient of a row is weights[t, s] * grad[t], that of a
    weight is rows[...] . grad[t].
    """

    @staticmethod
    def forward(rows, weights, order):  # type: ignore[no-untyped-def]
        return weighted_sum(rows, weights, order)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, weights, order = ctx.saved_tensors
        grad = grad.index_select(0, order // weights.shape[1])
        share = weights.flatten().index_select(0, order)[:, None]
        products = (grad * rows).sum(dim=-1).to(weights.dtype)
        grad_weights = torch.zeros_like(weights).view(-1).index_copy(0, order, products)
        return (grad * share).to(rows.dtype), grad_weights.view(weights.shape), None

    @staticmethod
    def jvp(ctx, d_rows, d_weights, _):  # type: ignore[no-untyped-def]
        rows, weights, order = ctx.saved_tensors
        y = 0
        if d_rows is not None:
            y = y + WeightedSum.apply(d_rows, weights, order)
        if d_weights is not None:
            y = y + WeightedSum.apply(rows, d_weights, order)
        return y


def one_hot_einsum(
    x: Float[Tensor, "tokens d_model"],
    routing: Routing,
    experts: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "tokens d_model"]:
    """Dispatch and combine as two einsums around the experts: a second opinion, not for speed.

    Arguments and result are those of `sorted_rows`. Every expert gets as many rows as the busiest
    one; those it lacks are zeros.

    Source: Lepikhin et al. 2020 (2006.16668), algorithm 1.
    """
    places = one_hot(routing).to(x.dtype)
    x = x.masked_fill(~routing.mask[:, None], 0)  # padding may hold NaN, and 0 * NaN is NaN
    rows = einsum(
        places, x, "tokens n_experts capacity, tokens d_model -> n_experts capacity d_model"
    )
    n_experts, capacity, _ = rows.shape
    counts = torch.full((n_experts,), capacity, device=x.device)
    outputs = experts(rows.flatten(0, 1), counts).unflatten(0, (n_experts, capacity))
    # The weight of each token at each expert, 0 where no slot of it holds that expert.
    share = routing.weights.new_zeros(len(x), n_experts + 1)
    share = share.scatter_add(1, routing.experts, routing.weights)[:, :-1].to(outputs.dtype)
    return einsum(
        places.to(outputs.dtype),
        share,
        outputs,
        "tokens n_experts capacity, tokens n_experts, n_experts capacity d_model -> tokens d_model",
    )


def one_hot(routing: Routing) -> Float[Tensor, "tokens n_experts capacity"]:
    """GShard's dispatch tensor: 1 where a token takes a place of an expert, in token order.

    Here `capacity` is the number of tokens of the busiest expert. Of tokens * n_experts * capacity
    entries only tokens * slots are not 0: sorted rows do without the others.

    Source: Lepikhin et al. 2020 (2006.16668), algorithm 1.
    """
    capacity = max(int(routing.counts.max()), 1)
    slots = F.one_hot(routing.experts, routing.n_experts + 1)[..., :-1]  # last column: nobody
    chosen = slots.sum(dim=1)
    place = chosen.cumsum(dim=0) - chosen  # tokens before this one at the same expert
    taken = F.one_hot(place.clamp(max=capacity - 1), capacity)
    return (taken * chosen[..., None]).float()
