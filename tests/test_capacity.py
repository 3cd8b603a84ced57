import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ref import (
    Capacity,
    ExpertChoiceRouter,
    GShardRouter,
    HashRouter,
    MoELayer,
    SwitchRouter,
    TopKRouter,
    specification,
)

from .tools import assert_close, assert_decided, gradients, make_layer, sizes, weight_gradients

PRIORITIES = ["choice", "position", "score"]
OVERFLOWS = ["drop", "reroute"]
factors = st.sampled_from([0.01, 0.3, 0.5, 1.0, 1.1, 1.25, 2.0, 100.0])


def scarce(shape, seed, *, skew=2.0, score="softmax", padded=True):
    """Router, tokens, mask and options of a batch that prefers some experts to others."""
    tokens, n_experts, k = shape
    torch.manual_seed(seed)
    router = TopKRouter(5, n_experts, k, score=score)
    x = torch.randn(tokens, 5) + skew * torch.randn(5)
    mask = torch.rand(tokens) < (0.8 if padded else 2)
    return router, x.requires_grad_(), mask


def spread(routing):
    """The distinct experts of each token that somebody serves."""
    return [[e for e in row if e < routing.n_experts] for row in routing.experts.tolist()]


@pytest.mark.parametrize(
    ("factor", "tokens", "k", "n_experts", "minimum", "limit"),
    [
        (1.0, 8, 1, 4, 1, 2),
        (1.0, 8, 2, 4, 1, 4),
        (1.0, 9, 1, 4, 1, 3),  # rounds up
        (1.25, 1024, 2, 64, 1, 40),
        (1.1, 100, 1, 10, 1, 11),  # exactly 11, though 1.1 * 100 / 10 > 11 in floats
        (0.7, 100, 1, 10, 1, 7),
        (1.5, 1000, 1, 1, 1, 1000),  # a token takes one place at most
        (0.01, 8, 1, 4, 1, 1),
        (0.01, 8, 1, 4, 4, 4),
        (0.01, 3, 1, 4, 4, 3),  # the minimum, but never more than the tokens
        (1.0, 1, 1, 64, 1, 1),
        (1.0, 1, 1, 64, 0, 1),
        (1.0, 0, 2, 4, 1, 0),
        (math.inf, 17, 2, 4, 1, 17),
    ],
)
def test_the_limit_is_the_factor_times_the_even_share(factor, tokens, k, n_experts, minimum, limit):
    assert Capacity(factor, minimum=minimum).limit(tokens, k, n_experts) == limit


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("overflow", OVERFLOWS)
@given(sizes(), factors, st.sampled_from(["softmax", "sigmoid"]), st.integers(0, 99))
def test_decisions_and_gradients_are_those_of_the_specification(
    overflow, priority, shape, factor, score, seed
):
    router, x, mask = scarce(shape, seed, score=score)
    capacity = Capacity(factor, overflow=overflow, priority=priority)
    before = specification.top_k(x, router.weight, shape[2], score=score, mask=mask.tolist())
    limit = capacity.limit(int(mask.sum()), shape[2], shape[1])
    after = getattr(specification, overflow)(before, limit, priority)
    routing = capacity(router(x, mask=mask))
    assert_decided(routing, after, demand=before.demand)
    for ours, theirs in zip(*weight_gradients(routing, after, [x, router.weight])):
        assert_close(ours, theirs, floor=0.1)


@pytest.mark.parametrize("overflow", OVERFLOWS)
@given(sizes(), factors, st.sampled_from(PRIORITIES), st.integers(0, 99))
def test_whatever_happens_the_books_balance(overflow, shape, factor, priority, seed):
    router, x, mask = scarce(shape, seed)
    free = router(x, mask=mask)
    capacity = Capacity(factor, overflow=overflow, priority=priority)
    routing = capacity(free)
    limit = capacity.limit(int(mask.sum()), shape[2], shape[1])
    assert routing.counts.max() <= limit
    assert all(len(set(row)) == len(row) for row in spread(routing))  # nobody twice at one expert
    served = sum(len(row) for row in spread(routing))
    nobody = ((routing.experts == shape[1]) & mask[:, None]).sum().item()
    assert served + nobody == int(mask.sum()) * shape[2]
    assert routing.dropped_fraction.item() == pytest.approx(nobody / max(served + nobody, 1))
    assert (routing.weights[routing.experts == shape[1]] == 0).all()
    for kept in ("demand", "logits", "scores", "mask"):
        assert getattr(routing, kept) is getattr(free, kept)
    assert routing.asked.equal(free.experts)
    assert (routing.experts[~mask] == shape[1]).all()
    undisturbed = routing.experts == free.experts
    assert routing.weights[undisturbed].equal(free.weights[undisturbed])


@given(sizes(), factors, st.sampled_from(PRIORITIES), st.integers(0, 99))
def test_reroute_never_drops_while_a_place_that_the_token_could_use_is_free(
    shape, factor, priority, seed
):
    router, x, mask = scarce(shape, seed)
    capacity = Capacity(factor, overflow="reroute", priority=priority)
    routing = capacity(router(x, mask=mask))
    room = capacity.limit(int(mask.sum()), shape[2], shape[1]) - routing.counts
    for t, used in enumerate(spread(routing)):
        if mask[t] and len(used) < shape[2]:
            assert all(room[e] == 0 for e in range(shape[1]) if e not in used)


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("priority", PRIORITIES)
def test_infinity_hands_back_the_very_same_routing(overflow, priority):
    routing = TopKRouter(4, 6, 2)(torch.randn(20, 4))
    assert Capacity(math.inf, overflow=overflow, priority=priority)(routing) is routing


@pytest.mark.parametrize("overflow", OVERFLOWS)
@given(sizes(), st.integers(0, 99))
def test_a_factor_beyond_all_demand_changes_no_decision(overflow, shape, seed):
    router, x, mask = scarce(shape, seed)
    free = router(x, mask=mask)
    routing = Capacity(1e6, overflow=overflow)(free)
    assert routing.experts.equal(free.experts) and routing.weights.equal(free.weights)


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("factor", [0.01, 1.0, 4.0])
def test_a_batch_of_one_token_is_served_in_full(overflow, factor):
    routing = TopKRouter(4, 8, 3)(torch.randn(1, 4))
    limited = Capacity(factor, overflow=overflow)(routing)
    assert limited.experts.equal(routing.experts) and limited.dropped_fraction == 0


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_no_tokens_and_nothing_but_padding_are_left_alone(overflow):
    router, capacity = TopKRouter(4, 8, 3), Capacity(1.0, overflow=overflow)
    assert capacity(router(torch.zeros(0, 4))).experts.shape == (0, 3)
    padding = capacity(router(torch.randn(5, 4), mask=torch.zeros(5, dtype=torch.bool)))
    assert (padding.experts == 8).all() and padding.dropped_fraction == 0


def test_padding_takes_no_place_and_adds_none():
    router, x, _ = scarce((12, 4, 2), 0, skew=0)
    mask = torch.arange(12) % 2 > 0
    for overflow in OVERFLOWS:
        capacity = Capacity(0.75, overflow=overflow)
        routing, alone = capacity(router(x, mask=mask)), capacity(router(x[mask]))
        assert routing.experts[mask].equal(alone.experts)
        assert_close(routing.weights[mask], alone.weights)


def by_hand(probabilities, k):
    """Top-k weights of tokens with these scores."""
    router = TopKRouter(3, 3, k, renormalize=False)
    torch.nn.init.eye_(router.weight)
    return router(torch.tensor(probabilities).log())


def test_the_three_priorities_serve_different_tokens_at_the_same_expert():
    # Expert 0 is first choice of tokens 1 and 2, second choice of token 0, and has two places.
    routing = by_hand([[0.4, 0.5, 0.1], [0.5, 0.3, 0.2], [0.7, 0.1, 0.2]], 2)
    assert (routing.experts == 0).any(dim=1).all()
    refused = {}
    for priority in PRIORITIES:
        limited = Capacity(1.0, priority=priority)(routing)
        refused[priority] = (~(limited.experts == 0).any(dim=1)).nonzero()[:, 0].tolist()
    assert refused == {"choice": [0], "position": [2], "score": [0]}
    routing = by_hand([[0.4, 0.5, 0.1], [0.5, 0.3, 0.2], [0.35, 0.25, 0.4]], 2)
    limited = Capacity(1.0, priority="score")(routing)
    assert limited.experts[2].tolist() == [2, 3]  # 0.35 is the least of the three weights


def test_a_rerouted_token_gets_its_next_best_expert_and_the_score_of_that_as_weight():
    routing = by_hand([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.7, 0.2, 0.1]], 1)
    limited = Capacity(1.0, overflow="reroute")(routing)
    assert limited.experts.tolist() == [[0], [2], [1]]
    torch.testing.assert_close(limited.weights, torch.tensor([[0.6], [0.3], [0.2]]))
    assert limited.demand.tolist() == [3, 0, 0] and limited.counts.tolist() == [1, 1, 1]
    assert limited.overflow.tolist() == [2, 0, 0] and limited.dropped_fraction == 0


def test_equal_weights_keep_the_order_of_the_tokens():
    router = HashRouter(2, 10)
    ids = torch.full((6,), 3)
    routing = router(torch.zeros(6, 1), token_ids=ids)
    limited = Capacity(1.0, priority="score")(routing)
    assert (limited.experts[:, 0] < 2).tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("priority", PRIORITIES)
def test_applying_the_same_rule_again_changes_nothing(overflow, priority):
    router, x, mask = scarce((17, 5, 2), 3)
    capacity = Capacity(1.0, overflow=overflow, priority=priority)
    once = capacity(router(x, mask=mask))
    twice = capacity(once)
    assert twice.experts.equal(once.experts) and twice.asked.equal(once.asked)


@pytest.mark.parametrize("make", [SwitchRouter, GShardRouter])
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_the_routing_of_any_router_can_be_limited(make, overflow):
    torch.manual_seed(0)
    router, x = make(5, 6), torch.randn(40, 5) + 2 * torch.randn(5)
    free = router(x)
    limit = Capacity(0.8).limit(40, router.k, 6)
    kept = [row.count(6) == 0 for row in free.experts.tolist()]
    spec = specification.switch if make is SwitchRouter else specification.gshard
    decision = spec(x, router.weight, *([] if make is SwitchRouter else [kept]))
    after = getattr(specification, overflow)(decision, limit, "choice")
    assert_decided(Capacity(0.8, overflow=overflow)(free), after, demand=decision.demand)


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_expert_choice_never_reaches_a_limit_of_its_own_share(overflow):
    routing = ExpertChoiceRouter(4, 6, 2)(torch.randn(30, 4))
    limited = Capacity(1.0, overflow=overflow)(routing)
    assert limited.experts.equal(routing.experts)


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_the_router_learns_from_the_places_that_were_kept_alone(overflow):
    layer = make_layer(4, 1, renormalize=False)
    layer.capacity = Capacity(0.5, overflow=overflow)
    x = torch.randn(12, 8) + 2
    y, routing = layer(x)
    dropped = routing.experts[:, 0] == 4
    assert dropped.any() and (y[dropped] == 0).all()
    alone = MoELayer(layer.router, layer.experts)
    if overflow == "drop":
        assert alone(x[~dropped])[1].experts.equal(routing.experts[~dropped])
        for ours, theirs in zip(
            torch.autograd.grad(y.square().sum(), list(layer.parameters())),
            torch.autograd.grad(alone(x[~dropped])[0].square().sum(), list(layer.parameters())),
        ):
            assert_close(ours, theirs)
    else:
        (gradient,) = gradients(y, layer.router.weight)
        assert gradient.any() and gradient.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 0.0}, "factor=0.0 is not more than 0"),
        ({"factor": -1.0}, "factor=-1.0 is not more than 0"),
        ({"factor": math.nan}, "factor=nan is not more than 0"),
        ({"factor": 1.0, "minimum": -1}, "minimum=-1 is less than 0"),
        ({"factor": 1.0, "overflow": "retry"}, "overflow='retry' is neither drop nor reroute"),
        ({"factor": 1.0, "priority": "age"}, "priority='age' is none of choice, position, score"),
    ],
)
def test_impossible_rules_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Capacity(**arguments)
