"""Parts of a reader's own, in every place that takes one; and parts that don't fit, refused."""

import dataclasses
from itertools import repeat

import pytest
import torch
from torch import nn

from moe_ref import (
    Capacity,
    Experts,
    FeedForward,
    MoELayer,
    Router,
    TopKRouter,
    Transformer,
    TransformerConfig,
    dispatch,
    generation,
    routers,
    training,
)
from moe_ref.layer import TensorOnly
from moe_ref.routing import decide, top_k

from .tools import assert_close, make_layer


class Coin(nn.Module):
    """A router of one's own: k experts by a linear map of the sign of each feature."""

    causal = True

    def __init__(self, d_model, n_experts, k, *, sharpness=1.0):
        super().__init__()
        self.n_experts, self.k, self.sharpness = n_experts, k, sharpness
        self.weight = nn.Parameter(torch.randn(n_experts, d_model))

    def forward(self, x, *, mask=None, token_ids=None):
        logits = self.sharpness * x.sign().float() @ self.weight.float().T
        scores = logits.softmax(dim=-1)
        experts = top_k(scores, self.k)
        return decide(experts, scores.gather(-1, experts), logits, scores, mask)


CONFIG = TransformerConfig(50, 16, 2, 4, 12, n_experts=4, k=2, router=Coin)


def test_a_router_of_ones_own_works_in_a_layer_with_every_other_part():
    torch.manual_seed(0)
    layer = MoELayer(
        Coin(8, 4, 2), Experts(4, 8, 12), capacity=Capacity(1.0), shared=FeedForward(8, 12)
    )
    assert isinstance(layer.router, Router)
    mask = torch.arange(12).view(2, 6) < 10
    y, routing = layer(torch.randn(2, 6, 8), mask=mask)
    assert routing.demand.sum() == 20 and (y[~mask] == 0).all()
    y.sum().backward()
    assert layer.router.weight.grad.abs().sum() > 0


def test_a_router_of_ones_own_is_trained_in_a_transformer_and_generates():
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(CONFIG, router_options={"sharpness": 0.5}))
    assert model.blocks[0].mlp.router.sharpness == 0.5
    before = model.blocks[0].mlp.router.weight.clone()
    tokens = torch.arange(34).view(2, 17)
    batch = training.Batch(tokens[:, :-1], tokens[:, 1:])
    config = training.TrainingConfig(steps=20, warmup=2, lr=0.01)
    history = training.train(model, lambda start: repeat(batch), config, progress=False)
    assert history.steps[-1]["loss"] < history.steps[0]["loss"] - 0.5
    assert not model.blocks[0].mlp.router.weight.equal(before)
    assert generation.generate(model, tokens[:, :4], 5).shape == (2, 9)


def test_a_dispatch_of_ones_own_is_handed_tokens_routing_and_experts():
    seen = []

    def watched(x, routing, experts):
        seen.append((x.shape, routing.n_experts, experts))
        return dispatch.sorted_rows(x, routing, experts)

    layer, x = make_layer(), torch.randn(2, 3, 8)
    expected = layer(x)[0]
    layer.dispatch = watched
    assert layer(x)[0].equal(expected)
    assert seen == [((6, 8), 4, layer.experts)]


def test_a_router_that_is_not_causal_says_so_and_is_refused_in_generation():
    class Peeking(Coin):
        causal = False

    model = Transformer(dataclasses.replace(CONFIG, router=Peeking))
    with pytest.raises(ValueError, match="Peeking is not causal"):
        generation.generate(model, torch.zeros(1, 2, dtype=torch.long), 1)


# ------------------------------------------------------------------------------ the registry


@pytest.mark.parametrize("name", routers.ROUTERS)
def test_every_router_of_the_registry_keeps_the_protocol(name):
    sizes = {"d_model": 8, "n_experts": 4, "k": 2, "vocab_size": 50}
    router = routers.make_router(name, {}, **sizes)
    routers.check_router(router)
    assert isinstance(router, Router) and router.n_experts == 4
    assert router.causal == (name != "expert_choice")
    routing = router(torch.randn(5, 8), token_ids=torch.arange(5))
    assert routing.n_experts == 4 and len(routing.mask) == 5


def test_an_option_that_no_router_takes_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="router_options='scal' is none of .*did you mean 'scale'"):
        Transformer(dataclasses.replace(CONFIG, router="top_k", router_options={"scal": 2.0}))


# ------------------------------------------------------------------------------ refused


class NoCount(nn.Module):
    causal = True


class NoCause(nn.Module):
    n_experts = 4


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"router": TopKRouter(32, 4, 2)}, "router has d_model=32, but experts have d_model=8"),
        ({"router": TopKRouter(8, 5, 2)}, "router has n_experts=5, but experts have n_experts=4"),
        ({"router": lambda x: x}, r"router=<function .* is no nn.Module; .*Router says"),
        ({"router": TopKRouter}, "router=TopKRouter is a class: give one made from it"),
        ({"router": NoCount()}, "NoCount has no attribute 'n_experts'"),
        ({"router": NoCause()}, "NoCause has no attribute 'causal'"),
        ({"experts": FeedForward(8, 12)}, r"experts=FeedForward\((.|\n)* is no Experts"),
        ({"shared": FeedForward(16, 12)}, "shared has d_model=16, but experts have d_model=8"),
        ({"shared": 12}, "shared=12 is no module"),
        ({"capacity": 1.25}, r"capacity=1.25 is no rule: make it Capacity\(1.25\)"),
        ({"dispatch": "einsum"}, r"dispatch='einsum' is no function \(x, routing, experts\) -> y"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_parts_that_do_not_fit_are_refused_by_name_when_the_layer_is_built(parts, message):
    parts = {"router": TopKRouter(8, 4, 2), "experts": Experts(4, 8, 12)} | parts
    with pytest.raises(ValueError, match=message):
        MoELayer(parts.pop("router"), parts.pop("experts"), **parts)


@pytest.mark.parametrize("wrong", [-1, 5])
@pytest.mark.parametrize("way", [dispatch.sorted_rows, dispatch.one_hot_einsum])
def test_an_expert_id_out_of_range_is_named_wherever_it_comes_from(way, wrong):
    layer, x = make_layer(), torch.randn(3, 8)
    routing = layer.router(x)
    experts = routing.experts.clone()
    experts[1, 1] = wrong
    message = rf"expert id {wrong} is outside 0 to n_experts - 1=3 \(and 4 for nobody\)"
    with pytest.raises(ValueError, match=message):  # from a capacity rule, say
        way(x, dataclasses.replace(routing, experts=experts), layer.experts)
    with pytest.raises(ValueError, match=message):  # from a router
        decide(experts, routing.weights, routing.logits, routing.scores)


# ------------------------------------------------------------------------------ a tensor alone


def test_a_layer_sits_in_a_sequence_and_hands_its_routing_over():
    torch.manual_seed(0)
    layer, seen = make_layer(), []
    model = nn.Sequential(nn.Linear(3, 8), TensorOnly(layer, seen.append), nn.Linear(8, 2))
    x = torch.randn(4, 3)
    y = model(x)
    assert_close(y, model[2](layer(model[0](x))[0]))
    (routing,) = seen
    assert routing.experts.shape == (4, 2)
    routing.scores.square().sum().backward()  # the graph is still there, for a balance loss
    assert layer.router.weight.grad.any()
    assert TensorOnly(layer)(torch.randn(2, 8)).shape == (2, 8)
