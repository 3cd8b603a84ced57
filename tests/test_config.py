"""What a `TransformerConfig` says of its blocks, what it refuses, and that a model obeys it."""

import dataclasses

import pytest
import torch

from moe_ref import FeedForward, MoELayer, Transformer, TransformerConfig
from moe_ref.model import upcycle
from moe_ref.rotary import Yarn, rotary_angles

from .tools import assert_close

MOE = TransformerConfig(50, 16, 4, 4, 12, n_kv_heads=2, n_experts=4)


def build(**changes):
    torch.manual_seed(0)
    return Transformer(dataclasses.replace(MOE, **changes))


def test_a_tuple_gives_each_block_its_own_number_of_experts():
    config = dataclasses.replace(MOE, n_experts=(0, 2, 8, 3), d_dense=20)
    decoder = Transformer(config)
    assert [config.experts_of(layer) for layer in range(4)] == [0, 2, 8, 3]
    assert isinstance(decoder.blocks[0].mlp, FeedForward) and decoder.blocks[0].mlp.d_ff == 20
    assert [block.mlp.experts.n_experts for block in decoder.blocks[1:]] == [2, 8, 3]
    routings = decoder(torch.randint(50, (2, 5))).routings
    assert [routing.scores.shape[1] for routing in routings] == [2, 8, 3]


def test_a_tuple_of_nothing_but_zeros_is_a_dense_model():
    config = dataclasses.replace(MOE, n_experts=(0, 0, 0, 0))
    assert not config.has_experts
    assert all(isinstance(block.mlp, FeedForward) for block in Transformer(config).blocks)
    assert Transformer(config).blocks[0].mlp.d_ff == config.d_ff


def test_every_factor_and_option_reaches_the_block_and_changes_what_it_computes():
    tokens, plain = torch.randint(50, (2, 12)), build()
    changes = [
        *({"embedding_scale": 2.0}, {"residual_scale": 0.5}, {"logits_divisor": 3.0}),
        *({"attention_scale": 0.1}, {"windows": (2,)}, {"yarn": Yarn(8.0, 4)}),
        *({"activation": "geglu"}, {"activation": "clipped_swiglu"}, {"rope_theta": 10.0}),
    ]
    for change in changes:
        other = build(**change)
        other.load_state_dict(plain.state_dict())
        gap = (other(tokens).logits - plain(tokens).logits).abs().max()
        assert gap > 1e-4, change
    other = build(logits_divisor=3.0)
    assert_close(other(tokens).logits * 3, plain(tokens).logits)


def test_biases_of_every_kind_are_parameters_where_they_are_asked_for():
    decoder = build(bias=True, qkv_bias=True, out_bias=True, d_shared=8, n_experts=(0, 4, 4, 4))
    names = {name for name, _ in decoder.blocks[1].named_parameters() if "bias" in name}
    assert names == {
        *(f"attention.{part}.bias" for part in ("qkv", "out")),
        *("mlp.experts.gate_up_bias", "mlp.experts.down_bias"),
        *("mlp.shared.gate_up.bias", "mlp.shared.down.bias"),
    }
    assert not [name for name, _ in build().named_parameters() if "bias" in name]


def test_a_dense_model_with_biases_is_upcycled_with_them():
    torch.manual_seed(0)
    config = dataclasses.replace(MOE, n_experts=0, bias=True, activation="gelu")
    dense, tokens = Transformer(config), torch.randint(50, (2, 7))
    assert_close(upcycle(dense, 4)(tokens).logits, dense(tokens).logits)


def test_a_mixed_in_shared_expert_is_in_every_moe_block():
    decoder = build(d_shared=8, shared_mix="softmax")
    kinds = [block.mlp.mix.kind for block in decoder.blocks if isinstance(block.mlp, MoELayer)]
    assert kinds == ["softmax"] * 4


def test_a_pyramid_with_residual_layers_trains():
    """Experts double from block to block, each beside a dense block, as in DeepSpeed's PR-MoE."""
    options = {"router": "switch", "k": 1, "d_shared": 12, "shared_mix": "softmax"}
    decoder = build(n_layers=3, n_experts=(8, 16, 32), **options)
    text = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.AdamW(decoder.parameters(), lr=1e-2), []
    before = decoder.blocks[0].mlp.mix.weight.clone()
    for _ in range(50):
        logits = decoder(text[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(decoder.blocks[0].mlp.mix.weight, before)


# ------------------------------------------------------------------------------ YaRN


def test_yarn_leaves_fast_pairs_slows_slow_ones_and_is_transformers_in_between():
    from transformers import GptOssConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for truncate in (True, False):
        theirs = {"rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0}
        theirs |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": truncate}
        theirs |= {"original_max_position_embeddings": 4096}
        config = GptOssConfig(head_dim=64, rope_parameters=theirs)
        speeds, amplitude = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
        yarn, one = Yarn(32.0, 4096, truncate=truncate), torch.tensor([[0, 1]])
        angles = rotary_angles(one, 64, 150_000.0, yarn)[0, 1]
        assert_close(angles, speeds)
        assert yarn.amplitude == pytest.approx(amplitude)
        plain = rotary_angles(one, 64, 150_000.0)[0, 1]
        assert_close(angles[:4], plain[:4])
        assert_close(angles[-4:] * 32, plain[-4:])


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_experts": (4, 4)}, r"n_experts=\(4, 4\) must have n_layers=4 entries"),
        ({"n_experts": (4, 4, -1, 4)}, r"n_experts=\(4, 4, -1, 4\) and d_shared=0 must be 0"),
        ({"n_experts": (4, 0, 4, 0), "every": 2}, "every=2 is no use"),
        ({"shared_mix": "sigmoid"}, "shared_mix='sigmoid' needs a shared expert: d_shared=0"),
        ({"shared_mix": "mean", "d_shared": 8}, "shared_mix='mean' is neither sigmoid nor softmax"),
        ({"qk_norm": "keys"}, "qk_norm='keys' is neither heads nor all"),
        ({"activation": "swish"}, "activation='swish' is none of swiglu"),
        ({"d_head": 5}, "d_head=5 is no even number of features"),
        ({"windows": (0,)}, r"windows=\(0,\) must be numbers of at least 1"),
        ({"windows": ()}, r"windows=\(\) must be numbers"),
        ({"logits_divisor": 0.0}, "logits_divisor=0 must not be 0"),
    ],
)
def test_an_impossible_configuration_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MOE, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 4096), "factor=0.5 must be at least 1"),
        ((2.0, 0), "original_length=0 must be at least 1"),
        ((2.0, 4096, 1.0, 32.0), "beta_fast=1.0 must be above beta_slow=32.0"),
    ],
)
def test_impossible_yarn_settings_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Yarn(*arguments)
