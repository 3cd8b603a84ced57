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

from dataclasses import dataclass

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
    tokens, slots = routing.experts.shape
    answers = rows.new_zeros(tokens * slots, rows.shape[-1]).index_copy(0, plan.order, rows)
    answers = answers.unflatten(0, (tokens, slots))
    return (answers * routing.weights[..., None]).sum(dim=1).to(rows.dtype)
