"""The decoder. Its mathematics is compared with transformers' in parity/test_models.py."""

import dataclasses
import math

import pytest
import torch

from moe_ref import FeedForward, MoELayer, Transformer, TransformerConfig, routers
from moe_ref.model import fold_scale, upcycle

from .tools import assert_close

DENSE = TransformerConfig(50, 16, 2, 4, 24, n_kv_heads=2)
MOE = dataclasses.replace(DENSE, n_experts=4, k=2, d_ff=12)


def build(config=MOE, seed=0):
    torch.manual_seed(seed)
    return Transformer(config)


def tokens(batch, seq, seed=0, vocab_size=50):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (batch, seq), generator=generator)


# ------------------------------------------------------------------------------ shape


def test_every_nth_block_has_experts_and_gives_a_routing():
    config = dataclasses.replace(MOE, n_layers=6, every=3)
    decoder = build(config)
    kinds = [type(block.mlp) for block in decoder.blocks]
    assert kinds == [FeedForward, FeedForward, MoELayer] * 2
    output = decoder(tokens(2, 7))
    assert output.logits.shape == (2, 7, 50)
    assert [routing.experts.shape for routing in output.routings] == [(14, 2)] * 2
    assert [config.is_moe(i) for i in range(6)] == [False, False, True] * 2


def test_a_dense_block_among_experts_costs_the_flops_of_k_experts_unless_told():
    config = dataclasses.replace(MOE, every=2)
    assert build(config).blocks[0].mlp.down.weight.shape == (16, 2 * 12)
    wider = dataclasses.replace(config, d_dense=40)
    assert build(wider).blocks[0].mlp.down.weight.shape == (16, 40)


def test_parameters_are_those_of_the_formula():
    config = dataclasses.replace(MOE, d_shared=20)
    attention = 16 * 16 * 2 + 2 * 16 * 8
    mlp = 4 * 16 + 4 * 3 * 16 * 12 + 3 * 16 * 20
    whole = 2 * 50 * 16 + 2 * (attention + mlp + 2 * 16) + 16
    assert sum(p.numel() for p in build(config).parameters()) == whole
    tied = build(dataclasses.replace(config, tied=True))
    assert sum(p.numel() for p in tied.parameters()) == whole - 50 * 16
    assert tied.head.weight is tied.embedding.weight


@pytest.mark.parametrize("router", routers.ROUTERS)
def test_every_router_can_sit_in_every_block_and_learns(router):
    config = dataclasses.replace(MOE, router=router, k=1 if router == "switch" else 2)
    decoder = build(config)
    output = decoder(tokens(2, 9))
    output.logits.square().mean().backward()
    assert len(output.routings) == 2
    for name, parameter in decoder.named_parameters():
        if "noise" not in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if router != "hash":
        assert decoder.blocks[0].mlp.router.weight.grad.any()


def test_router_options_and_capacity_reach_the_layer():
    options = {"score": "sigmoid", "selection_bias": True}
    config = dataclasses.replace(
        MOE, router_options=options, capacity_factor=0.5, capacity_options={"priority": "score"}
    )
    decoder = build(config)
    assert decoder.blocks[0].mlp.router.bias is not None
    assert decoder.blocks[0].mlp.capacity.priority == "score"
    assert decoder(tokens(2, 8)).routings[0].dropped_fraction >= 0.5


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_frequencies_reach_the_hash_table_of_every_block(kind):
    often = [50 - i for i in range(50)]
    options = {"frequencies": kind(often), "seed": 3}
    decoder = build(dataclasses.replace(MOE, router="hash", router_options=options))
    table = routers.HashRouter(4, 50, seed=3, frequencies=often).table
    assert all(block.mlp.router.table.equal(table) for block in decoder.blocks)
    ids = tokens(2, 9)
    for routing in decoder(ids).routings:
        assert routing.experts[:, 0].equal(table[ids.flatten()])


def test_a_printed_model_says_its_sizes_and_shows_equal_blocks_once():
    text = repr(build())
    assert "n_experts=4, tied=False" in text and "(0-1): 2 x Block(" in text
    assert "Attention(\n        d_model=16, n_heads=4, n_kv_heads=2\n" in text
    assert repr(build()(tokens(2, 7))) == "Output(logits=[2, 7, 50], routings=2)"


# ------------------------------------------------------------------------------ causality


def test_a_later_token_changes_no_earlier_logit_unless_experts_choose():
    before, after = tokens(1, 12), tokens(1, 12)
    after[0, -1] = (after[0, -1] + 1) % 50
    for router, same in (("top_k", True), ("expert_choice", False)):
        decoder = build(dataclasses.replace(MOE, router=router)).eval()
        one, other = decoder(before).logits[:, :-1], decoder(after).logits[:, :-1]
        assert torch.allclose(one, other, atol=1e-6) == same, router


# ------------------------------------------------------------------------------ dtypes


def test_bfloat16_stays_near_float32_and_routes_in_float32():
    decoder = build().eval()
    expected = decoder(tokens(2, 9)).logits
    output = decoder.bfloat16()(tokens(2, 9))
    assert output.logits.dtype == torch.bfloat16
    assert output.routings[0].logits.dtype == torch.float32
    assert_close(output.logits, expected, relative=0.1)


def test_autocast_trains_float32_weights():
    decoder = build()
    with torch.autocast("cpu", torch.bfloat16):
        loss = decoder(tokens(2, 9)).logits.float().square().mean()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in decoder.parameters())


# ------------------------------------------------------------------------------ upcycling


@pytest.mark.parametrize("scale", [2**0.5, 0.3, 1.0])
def test_a_folded_scale_leaves_the_function_and_the_gradients_that_reach_further_down(scale):
    config = dataclasses.replace(MOE, every=2, router_options={"scale": scale})
    scaled, folded = build(config), fold_scale(build(config))
    ids = tokens(3, 7)
    ours, theirs = folded(ids).logits, scaled(ids).logits
    assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (name, a), b in zip(folded.named_parameters(), scaled.parameters(), strict=True):
        assert_close(a.grad * (scale if name.endswith("experts.down") else 1), b.grad)
    assert folded.config == dataclasses.replace(config, router_options={})


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_weights_that_sum_to_one_start_at_the_root_of_k_below_a_dense_block(k):
    torch.manual_seed(0)
    x, blocks = torch.randn(64, 64), [FeedForward(64, 128) for _ in range(8)]
    dense = torch.stack([block(x).std() for block in blocks]).mean()
    config = TransformerConfig(9, 64, 1, 4, 128, n_experts=32, k=k)
    layers = [Transformer(config).blocks[0].mlp for _ in range(8)]
    sparse = torch.stack([layer(x)[0].std() for layer in layers]).mean()
    assert 0.9 < sparse / dense * k**0.5 < 1.25  # above 1: the weights are not quite equal


@pytest.mark.parametrize(("n_experts", "k", "every"), [(4, 2, 1), (4, 4, 2), (1, 1, 1), (8, 1, 2)])
def test_an_upcycled_model_begins_as_the_same_function(n_experts, k, every):
    dense = build(DENSE).eval()
    moe = upcycle(dense, n_experts, k=k, every=every).eval()
    assert len(moe(tokens(2, 9)).routings) == 2 // every
    assert_close(moe(tokens(2, 9)).logits, dense(tokens(2, 9)).logits)


def test_upcycling_copies_the_weights_and_leaves_the_dense_model_alone():
    dense = build(DENSE)
    before = {name: t.clone() for name, t in dense.state_dict().items()}
    moe = upcycle(dense, 4)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert all(torch.equal(t, before[name]) for name, t in dense.state_dict().items())
    with pytest.raises(ValueError, match="the model has n_experts=4 already"):
        upcycle(moe, 4)


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 18}, "n_heads=4 does not divide d_model=18"),
        ({"d_model": 12}, "n_heads=4 does not divide d_model=12 into heads of an even number"),
        ({"n_kv_heads": 3}, "n_kv_heads=3 does not divide n_heads=4"),
        ({"n_kv_heads": 0}, "n_kv_heads=0 does not divide n_heads=4"),
        ({"router": "best"}, "router='best' is none of top_k, noisy_top_k"),
        ({"n_experts": -1}, "n_experts=-1 and d_shared=0 must be 0 or more"),
        ({"every": 3}, "every=3 is more than n_layers=2: no block would be MoE"),
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
    ],
)
def test_an_impossible_configuration_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MOE, **changes)


@pytest.mark.parametrize("wrong", [-1, 50])
def test_a_token_outside_the_vocabulary_is_refused(wrong):
    ids = tokens(1, 4)
    ids[0, 2] = wrong
    with pytest.raises(ValueError, match=f"token {wrong} is not one of vocab_size=50"):
        build()(ids)


def test_an_infinite_capacity_is_no_capacity_rule():
    assert math.isinf(MOE.capacity_factor)
    assert build().blocks[0].mlp.capacity is None
