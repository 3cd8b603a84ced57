"""`MoELayer` against the MoE blocks of the transformers library: same weights, same results.

Disagreements of transformers with the papers, or with itself, are recorded at the end.
"""

import pytest
import torch

from moe_ref import specification
from tests.tools import assert_close, gradients

from . import blocks
from .blocks import D_MODEL

# Batch, sequence, seed.
CASES = [(1, 1, 0), (1, 7, 1), (2, 16, 2), (3, 50, 3)]
BACKENDS = ["loop", "grouped"]
MODELS = ["mixtral", "olmoe", "qwen2", "qwen3", "deepseek", "granite", "switch"]


def pair(name, seed=0, scale=0.1, **options):
    return getattr(blocks, name)(seed, scale, **options)


def by_expert(experts, weights):
    """Slots in the order of the experts; those of DeepSeek-V3 come in no order of their own."""
    order = experts.argsort(dim=-1)
    return experts.gather(-1, order), weights.gather(-1, order)


def decisions(block, x):
    """Experts and weights of every token, by the router of the block."""
    if hasattr(block, "gate"):
        _, weights, experts = block.gate(x)
    elif hasattr(block.router, "top_k"):
        _, weights, experts = block.router(x.reshape(-1, D_MODEL))
    else:  # Switch: one-hot, all zeros where there was no place
        chosen, scores, logits = block.router(x)
        full = chosen.sum(dim=-1, keepdim=True) == 0
        experts = chosen.argmax(dim=-1, keepdim=True).masked_fill(full, logits.shape[-1])
        return experts.flatten(0, 1), scores.flatten(0, 1)
    return experts, weights


def compare(name, pair, x):
    """Chosen experts, their weights, the output, and the gradient of every tensor."""
    leaves = [x, *pair.block.parameters()]
    theirs = pair.block(x)
    expected = gradients(theirs, *leaves)
    experts, weights = decisions(pair.block, x)
    for backend in BACKENDS:
        pair.layer.experts.backend = backend
        ours, routing = pair.forward(x)
        chosen, shares = routing.experts, routing.weights
        if name == "deepseek":
            chosen, shares = by_expert(chosen, shares)
            experts, weights = by_expert(experts, weights)
        assert chosen.equal(experts)
        assert_close(shares, weights)
        assert_close(ours, theirs)
        for mine, other in zip(gradients(ours, *leaves), expected, strict=True):
            assert_close(mine, other)


def tokens(*shape):
    return torch.randn(*shape, D_MODEL, requires_grad=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_routing_and_all_gradients_are_those_of_transformers(name, case):
    *shape, seed = case
    compare(name, pair(name, seed), tokens(*shape))


@pytest.mark.parametrize("name", MODELS)
def test_parity_holds_for_large_logits_where_scores_saturate(name):
    compare(name, pair(name, scale=3.0), tokens(1, 20))


@pytest.mark.parametrize("name", MODELS)
def test_parity_holds_when_all_tokens_are_alike(name):
    both = pair(name)
    compare(name, both, torch.randn(1, 1, D_MODEL).repeat(2, 12, 1).requires_grad_())


@pytest.mark.parametrize("bias", [-5.0, -0.6, 5.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_parity_holds_for_biases_that_make_every_score_negative_or_large(bias, seed):
    compare("deepseek", pair("deepseek", seed, bias=bias), tokens(2, 16))


@pytest.mark.parametrize("places", [1, 3, 64])
def test_switch_drops_the_tokens_that_transformers_drops(places):
    both = pair("switch", places=places)
    x = (torch.randn(3, 30, D_MODEL) + torch.randn(D_MODEL)).requires_grad_()
    _, routing = both.forward(x)
    dropped = int((routing.experts == 8).sum())
    assert (dropped == 0) == (places == 64)
    compare("switch", both, x)


# ------------------------------------------------------------------ where transformers is alone


def test_masking_groups_with_zero_as_axk2_does_picks_ruled_out_experts_under_negative_bias():
    """DeepSeek-V3 (2412.19437, section 2.1.2) lets a token use the experts of 4 groups alone.

    transformers' DeepseekV3TopkRouter rules the others out with -inf, as ours does. Its
    AXK2TopkRouter fills in 0.0 ("intentionally to match reference implementation"): with negative
    biases an expert that is ruled out beats all that are not.
    """
    both = pair("deepseek", bias=-3.0)
    x = torch.randn(10, D_MODEL)
    bias = both.layer.router.bias
    options = {"bias" if key == "selection_bias" else key: v for key, v in blocks.GROUPS.items()}
    paper = specification.top_k(x, both.block.gate.weight, 8, **options | {"bias": bias})
    chosen = [sorted(expert for expert, _ in slots) for slots in paper.slots]
    assert both.layer.router(x).experts.sort(dim=-1).values.tolist() == chosen
    assert both.block.gate(x)[2].sort(dim=-1).values.tolist() == chosen
    axk2 = blocks.axk2_router(bias)
    axk2.weight = both.block.gate.weight
    theirs = axk2(x)[2]
    for t in range(10):
        allowed = {expert // 8 for expert in chosen[t]}
        assert len(allowed) <= 4
        assert not set(theirs[t].tolist()) & set(chosen[t])  # not one expert in common
    axk2.e_score_correction_bias = bias + 3 - bias.min()  # without negative scores all agree
    both.layer.router.bias.copy_(axk2.e_score_correction_bias)
    ours = both.layer.router(x).experts.sort(dim=-1).values
    assert axk2(x)[2].sort(dim=-1).values.equal(ours)


def test_the_jitter_of_transformers_switch_reaches_the_experts_and_the_tensor_of_the_caller():
    """Switch (2101.03961) multiplies the input of the *router*; transformers does so in place.

    In float32 its router's `hidden_states *= noise` writes to the tensor it was given, so the
    experts, and whoever holds that tensor, get the noisy tokens too.
    """
    both = pair("switch")
    both.block.router.train()
    assert both.block.router.jitter_noise == 0.01  # as in the released models
    x = torch.randn(1, 5, D_MODEL)
    before = x.clone()
    with torch.no_grad():
        both.block(x)
    assert not x.equal(before)
    assert ((x / before - 1).abs() <= 0.01 + 1e-6).all()
    both.layer.router.jitter = 0.01
    x = before.clone()
    both.layer(x)
    assert x.equal(before)
