import math

import pytest
import torch
from hypothesis import given

from moe_ref import Routing, TopKRouter
from moe_ref.routing import count

from .tools import sizes


def decision(experts: list[list[int]], n_experts: int, demand: list[int] | None = None) -> Routing:
    """A routing with these slots and equal scores; the demand is what is served unless given."""
    slots = torch.tensor(experts)
    flat = torch.full((len(experts), n_experts), 1 / n_experts)
    asked = count(slots, n_experts) if demand is None else torch.tensor(demand)
    mask = torch.ones(len(experts), dtype=torch.bool)
    weights = (slots < n_experts).float()
    return Routing(slots, weights, flat.log(), flat, asked, mask)


def test_counts_are_the_slots_each_expert_serves_and_nobody_is_not_counted():
    routing = decision([[0, 2], [2, 3], [3, 3]], n_experts=3)
    assert routing.n_experts == 3
    assert routing.counts.tolist() == [1, 0, 2]


def test_overflow_is_demand_not_served_and_never_negative():
    # Expert 0 was asked by three tokens and serves one; one of the others went on to expert 1.
    routing = decision([[0], [1], [2]], n_experts=2, demand=[3, 0])
    assert routing.overflow.tolist() == [2, 0]
    assert routing.dropped_fraction.item() == pytest.approx(1 / 3)


def test_load_is_the_share_of_all_assignments_and_sums_to_one():
    routing = decision([[0, 1], [0, 2]], n_experts=4)
    assert routing.load_share.tolist() == [0.5, 0.25, 0.25, 0]


def test_entropy_is_log_n_for_equal_scores_and_zero_for_a_certain_router():
    assert decision([[0]], n_experts=8).entropy.item() == pytest.approx(math.log(8))
    router = TopKRouter(4, 4, 1)
    torch.nn.init.eye_(router.weight)
    assert router(torch.tensor([[1e4, 0.0, 0.0, 0.0]])).entropy.item() == 0


def test_entropy_does_not_count_padding():
    router = TopKRouter(4, 8, 2)
    x = torch.randn(6, 4)
    mask = torch.tensor([True, True, True, False, False, False])
    torch.testing.assert_close(router(x, mask=mask).entropy, router(x[:3]).entropy)


def test_no_tokens_give_zeros_and_not_nan():
    routing = TopKRouter(4, 3, 2)(torch.zeros(0, 4))
    assert routing.counts.tolist() == [0, 0, 0]
    assert routing.load_share.tolist() == [0, 0, 0]
    assert routing.dropped_fraction.item() == 0
    assert routing.entropy.item() == 0


@given(sizes())
def test_every_assignment_is_either_served_or_dropped(shape):
    tokens, n_experts, k = shape
    routing = TopKRouter(4, n_experts, k)(torch.randn(tokens, 4))
    assert routing.demand.sum() == tokens * k
    assert (routing.counts + routing.overflow == routing.demand).all()


def test_a_routing_cannot_be_edited_in_place_by_assignment():
    with pytest.raises(AttributeError):
        decision([[0]], n_experts=1).experts = torch.zeros(1, 1, dtype=torch.long)
