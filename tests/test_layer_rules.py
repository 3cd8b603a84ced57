"""The layer under every router and every capacity rule, and under torch.compile."""

import copy
import math

import pytest
import torch

from moe_ref import (
    Capacity,
    ExpertChoiceRouter,
    Experts,
    GShardRouter,
    HashRouter,
    MoELayer,
    NoisyTopKRouter,
    SwitchRouter,
    TopKRouter,
    dispatch,
)

from .tools import assert_close, gradients

ROUTERS = {
    "top-k": lambda: TopKRouter(8, 6, 2),
    "grouped": lambda: TopKRouter(
        8, 6, 2, score="sigmoid", scale=2.5, n_groups=3, groups_kept=2, selection_bias=True
    ),
    "noisy": lambda: NoisyTopKRouter(8, 6, 2),
    "switch": lambda: SwitchRouter(8, 6, jitter=0.2),
    "gshard": lambda: GShardRouter(8, 6),
    "hash": lambda: HashRouter(6, 50),
    "expert choice": lambda: ExpertChoiceRouter(8, 6, 2),
}
CAPACITIES = {
    "none": lambda: None,
    "infinite": lambda: Capacity(math.inf),
    "drop": lambda: Capacity(0.7, priority="score"),
    "reroute": lambda: Capacity(1.0, overflow="reroute"),
}


def make(router, capacity="none", backend="loop"):
    torch.manual_seed(0)
    experts = Experts(6, 8, 12, bias=True, backend=backend)
    return MoELayer(ROUTERS[router](), experts, capacity=CAPACITIES[capacity]())


def batch(tokens=20):
    """Tokens that prefer some experts, their ids, and a mask."""
    torch.manual_seed(3)
    x = torch.randn(tokens, 8) + torch.randn(8)
    ids = torch.randint(50, (tokens,))
    return x.requires_grad_(), {"token_ids": ids, "mask": torch.rand(tokens) < 0.8}


@pytest.mark.parametrize("capacity", ["none", "drop", "reroute"])
@pytest.mark.parametrize("router", ROUTERS)
def test_all_backends_and_the_einsum_agree_under_every_rule_forward_and_backward(router, capacity):
    layer = make(router, capacity)
    x, given = batch()
    leaves = [x, *layer.parameters()]
    torch.manual_seed(5)
    y, routing = layer(x, **given)
    expected = gradients(y, *leaves)
    for backend in ("padded", "grouped"):
        other = copy.deepcopy(layer)
        other.experts.backend = backend
        torch.manual_seed(5)  # the same noise
        again, decided = other(x, **given)
        assert decided.experts.equal(routing.experts)
        assert_close(again, y)
        for ours, theirs in zip(gradients(again, x, *other.parameters()), expected):
            assert_close(ours, theirs, floor=0.1)
    torch.manual_seed(5)
    routing = layer.router(x, **given)
    if layer.capacity is not None:
        routing = layer.capacity(routing)
    by_einsum = dispatch.one_hot_einsum(x, routing, layer.experts)
    assert_close(by_einsum, y)
    for ours, theirs in zip(gradients(by_einsum, *leaves), expected):
        assert_close(ours, theirs, floor=0.1)


@pytest.mark.parametrize("router", ROUTERS)
def test_an_infinite_capacity_is_no_capacity(router):
    layer, limited = make(router).eval(), make(router, "infinite").eval()
    x, given = batch()
    assert layer(x, **given)[0].equal(limited(x, **given)[0])


def alone_and_together(layer, x, token_ids):
    """Each token's answer in a batch of its own, and in the whole batch."""
    together = layer(x, token_ids=token_ids)[0]
    alone = [layer(x[t : t + 1], token_ids=token_ids[t : t + 1])[0] for t in range(len(x))]
    return torch.cat(alone), together


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_neighbours_matter_if_and_only_if_places_are_limited_or_experts_choose(router, capacity):
    layer = make(router, capacity).eval()
    x, given = batch()
    alone, together = alone_and_together(layer, x.detach(), given["token_ids"])
    if router != "expert choice" and capacity in ("none", "infinite"):
        assert_close(together, alone)
    else:
        assert (together - alone).abs().max() > 1e-2 * alone.abs().max()


@pytest.mark.parametrize("router", ROUTERS)
def test_permuting_tokens_permutes_outputs_where_no_place_is_limited(router):
    layer = make(router).eval()
    x, given = batch()
    order = torch.randperm(len(x))
    y, _ = layer(x, **given)
    shuffled, _ = layer(x[order], **{name: value[order] for name, value in given.items()})
    assert_close(shuffled, y[order])
