"""What a reader finds who prints a part, and parts drawn anew."""

import pytest
import torch

from moe_ref import (
    Capacity,
    ExpertChoiceRouter,
    Experts,
    FeedForward,
    GShardRouter,
    HashRouter,
    MoELayer,
    NoisyTopKRouter,
    SwitchRouter,
    TopKRouter,
    dispatch,
)

from .tools import make_layer

DEEPSEEK = dict(score="sigmoid", scale=2.5, n_groups=4, groups_kept=2, selection_bias=True)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (TopKRouter(256, 8, 2), "TopKRouter(d_model=256, n_experts=8, k=2, score=softmax)"),
        (
            TopKRouter(8, 8, 2, renormalize=False, **DEEPSEEK),
            "TopKRouter(d_model=8, n_experts=8, k=2, score=sigmoid, renormalize=False, scale=2.5,"
            " n_groups=4, groups_kept=2, selection_bias=True)",
        ),
        (NoisyTopKRouter(4, 8, 2), "NoisyTopKRouter(d_model=4, n_experts=8, k=2)"),
        (SwitchRouter(4, 8), "SwitchRouter(d_model=4, n_experts=8, k=1, jitter=0.0)"),
        (GShardRouter(4, 8), "GShardRouter(d_model=4, n_experts=8, k=2, second=random)"),
        (HashRouter(8, 50), "HashRouter(n_experts=8, vocab_size=50, k=1, seed=0)"),
        (
            HashRouter(2, 3, frequencies=[5, 1, 0]),
            "HashRouter(n_experts=2, vocab_size=3, k=1, seed=0, balanced)",
        ),
        (ExpertChoiceRouter(4, 8, 1.5), "ExpertChoiceRouter(d_model=4, n_experts=8, k=1.5)"),
        (
            Experts(8, 4, 6, bias=True),
            "Experts(n_experts=8, d_model=4, d_ff=6, activation=swiglu, bias=True, backend=auto)",
        ),
        (Capacity(1.25), "Capacity(factor=1.25, overflow='drop', priority='choice', minimum=1)"),
    ],
)
def test_a_part_prints_its_sizes_and_options(part, said):
    assert repr(part) == said


def test_a_layer_prints_its_parts_and_its_dispatch():
    layer = MoELayer(
        TopKRouter(4, 8, 2),
        Experts(8, 4, 6),
        capacity=Capacity(2.0),
        shared=FeedForward(4, 6),
        dispatch=dispatch.one_hot_einsum,
    )
    first, *parts = repr(layer).splitlines()
    assert first == "MoELayer("
    assert parts[0] == (
        "  capacity=Capacity(factor=2.0, overflow='drop', priority='choice', minimum=1),"
        " dispatch=one_hot_einsum"
    )
    assert parts[1] == "  (router): TopKRouter(d_model=4, n_experts=8, k=2, score=softmax)"


def test_a_routing_prints_its_shapes_and_counts():
    torch.manual_seed(0)
    layer = make_layer(3, 1)
    torch.nn.init.zeros_(layer.router.weight)
    routing = layer.router(torch.randn(5, 8), mask=torch.arange(5) < 4)
    said = "Routing(tokens=5, slots=1, n_experts=3, demand=[4, 0, 0], served="
    assert repr(routing) == said + "[4, 0, 0])"
    assert repr(Capacity(1.0)(routing)) == said + "[2, 0, 0])"
    many = TopKRouter(8, 40, 2)(torch.randn(1, 8))
    assert repr(many) == "Routing(tokens=1, slots=2, n_experts=40, demand=0 to 1, served=0 to 1)"


# ------------------------------------------------------------------------------ initialisation


@pytest.mark.parametrize(
    "router", [TopKRouter(64, 400, 2), NoisyTopKRouter(64, 400, 2), ExpertChoiceRouter(64, 400, 2)]
)
def test_routers_are_drawn_uniformly_within_one_over_the_root_of_d_model(router):
    weight = router.weight
    bound = 64**-0.5
    assert weight.abs().max() <= bound
    assert weight.max() > 0.99 * bound and weight.min() < -0.99 * bound
    assert abs(weight.std().item() / bound - 3**-0.5) < 0.02


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_experts_are_drawn_as_linear_layers_draw_theirs(activation):
    experts = Experts(40, 16, 64, activation=activation, bias=True)
    for parameter, inputs in (
        (experts.input_weight, 16),
        (experts.input_bias, 16),
        (experts.down, 64),
        (experts.down_bias, 64),
    ):
        bound = inputs**-0.5
        assert 0.95 * bound < parameter.abs().max() <= bound


@pytest.mark.parametrize(
    "part",
    [lambda: TopKRouter(8, 4, 2), lambda: NoisyTopKRouter(8, 4, 2), lambda: Experts(4, 8, 6)],
)
def test_reset_parameters_draws_what_the_constructor_draws(part):
    torch.manual_seed(0)
    made = part()
    expected = [parameter.clone() for parameter in made.parameters()]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(7)
    torch.manual_seed(0)
    made.reset_parameters()
    for ours, theirs in zip(made.parameters(), expected, strict=True):
        assert ours.equal(theirs)
