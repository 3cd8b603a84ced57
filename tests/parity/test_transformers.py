"""`MoELayer` against the MoE blocks of the transformers library: same weights, same results.

The blocks take the options of the released models, scaled down, with transformers' own ("eager")
implementation of the experts, and random weights of the released initialisation or larger.
"""

import pytest
import torch
from transformers import MixtralConfig, OlmoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from moe_ref import Experts, MoELayer, TopKRouter
from tests.tools import assert_close, gradients

SHAPES = [(1, 1), (1, 7), (2, 16), (3, 50)]  # batch, sequence
SEEDS = [0, 1, 2]


def mixtral():
    """Mixtral 8x7B: 8 experts, top-2, weights renormalised; d_ff 3.5 times d_model."""
    config = MixtralConfig(
        hidden_size=64, intermediate_size=224, num_local_experts=8, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    return MixtralSparseMoeBlock(config), TopKRouter(64, 8, 2), Experts(8, 64, 224)


def olmoe():
    """OLMoE 1B-7B: 64 experts, top-8, weights not renormalised; d_ff half of d_model."""
    config = OlmoeConfig(
        hidden_size=64,
        intermediate_size=32,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
    )
    config._experts_implementation = "eager"
    router = TopKRouter(64, 64, 8, renormalize=False)
    return OlmoeSparseMoeBlock(config), router, Experts(64, 64, 32)


def pair(make, seed: int, scale: float = 0.1):
    """A block of transformers, and our layer whose parameters *are* its tensors: no copy."""
    block, router, experts = make()
    torch.manual_seed(seed)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    router.weight = block.gate.weight
    experts.gate_up = block.experts.gate_up_proj
    experts.down = block.experts.down_proj
    return block, MoELayer(router, experts)


def compare(block, layer, x):
    """Chosen experts, their weights, the output, and the gradient of every tensor."""
    ours, routing = layer(x)
    theirs = block(x)
    _, weights, experts = block.gate(x)
    assert routing.experts.equal(experts)
    assert_close(routing.weights, weights)
    assert_close(ours, theirs)
    leaves = [x, *block.parameters()]
    for mine, other in zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True):
        assert_close(mine, other)


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [mixtral, olmoe])
def test_outputs_routing_and_all_gradients_are_those_of_transformers(make, shape, seed, backend):
    block, layer = pair(make, seed)
    layer.experts.backend = backend
    compare(block, layer, torch.randn(*shape, 64, requires_grad=True))


@pytest.mark.parametrize("make", [mixtral, olmoe])
def test_parity_holds_for_large_logits_where_softmax_saturates(make):
    block, layer = pair(make, seed=0, scale=3.0)
    compare(block, layer, torch.randn(1, 20, 64, requires_grad=True))


@pytest.mark.parametrize("make", [mixtral, olmoe])
def test_parity_holds_when_all_tokens_are_alike(make):
    block, layer = pair(make, seed=0)
    compare(block, layer, torch.randn(1, 1, 64).repeat(1, 12, 1).requires_grad_())
