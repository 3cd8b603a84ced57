"""Checkpoints of quantised models: what was saved comes back to the bit, and the mark is plain."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_ref import TransformerConfig, checkpoints
from moe_ref.quantise import plan_of, quantise_model

from .common import DENSE, MOE, assert_same, build

GPT_OSS = TransformerConfig(
    50,
    16,
    2,
    4,
    12,
    n_kv_heads=2,
    n_experts=4,
    router_options={"logit_bias": True},
    activation="clipped_swiglu",
    bias=True,
    qkv_bias=True,
    out_bias=True,
    sinks=True,
)
TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


def edit(folder, change):
    """Rewrite what config.json says of the quantised parts."""
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    change(settings["quantization_config"])
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("bits", [8, 4, [[8, 4, 4, 8], [4, 4, 4, 8]]])
@pytest.mark.parametrize("which", ["experts", "all"])
@pytest.mark.parametrize("config", [MOE, GPT_OSS])
@pytest.mark.parametrize("shard_size", [None, 1000])
def test_a_quantised_model_comes_back_to_the_bit(config, which, bits, shard_size, tmp_path):
    model = quantise_model(build(config), bits, group=8, which=which).eval()
    checkpoints.save(model, tmp_path, shard_size=shard_size)
    loaded = checkpoints.load(tmp_path)
    assert_same(loaded, model)
    assert plan_of(loaded) == plan_of(model) and loaded.config == model.config
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    frozen = {name for name, p in loaded.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}


def test_a_tied_dense_model_comes_back_to_the_bit(tmp_path):
    model = quantise_model(build(DENSE), 4, which="all")
    checkpoints.save(model, tmp_path)
    loaded = checkpoints.load(tmp_path)
    assert_same(loaded, model)
    assert loaded.head.weight is loaded.embedding.weight


def test_codes_stay_what_they_are_in_a_file_or_a_model_of_another_dtype(tmp_path):
    model = quantise_model(build(), 4)
    checkpoints.save(model, tmp_path, dtype=torch.bfloat16)
    held = model.blocks[0].mlp.experts.down
    for dtype in (None, torch.float64):
        down = checkpoints.load(tmp_path, dtype=dtype).blocks[0].mlp.experts.down
        assert torch.equal(down.codes, held.codes)
        assert down.scales.dtype == (dtype or torch.bfloat16)
        assert torch.equal(down.scales, held.scales.bfloat16().to(down.scales.dtype))


def test_a_part_of_a_quantised_model_is_read_alone(tmp_path):
    bits = [[8, 4, 4, 8], [4, 4, 8, 8]]
    model = quantise_model(build(), bits, which="all").eval()
    checkpoints.save(model, tmp_path)
    x = torch.randn(3, 16)
    wanted = model.blocks[1].mlp(x)[0]
    part = checkpoints.load(tmp_path, layers=slice(1, 2))
    assert torch.equal(part.blocks[0].mlp(x)[0], wanted)
    assert plan_of(part)["blocks.0.mlp.experts"] == (bits[1], 32)
    assert torch.equal(checkpoints.layer(tmp_path, 1)(x)[0], wanted)


def test_the_file_shrinks_with_the_bits(tmp_path):
    model = build(TransformerConfig(50, 32, 2, 4, 256, n_experts=4)).bfloat16()
    sizes = []
    for part in (model, quantise_model(model, 8), quantise_model(model, 4)):
        checkpoints.save(part, tmp_path)
        sizes.append((tmp_path / "model.safetensors").stat().st_size)
    numbers = sum(p.numel() for block in model.blocks for p in block.mlp.experts.parameters())
    # 16, 8.5 and 4.5 bits for each number; headers differ by less than a page.
    assert sizes[0] - sizes[1] == pytest.approx(numbers * 7.5 / 8, abs=4096)
    assert sizes[1] - sizes[2] == pytest.approx(numbers * 4 / 8, abs=4096)


def test_a_model_saved_over_a_quantised_one_leaves_no_mark(tmp_path):
    checkpoints.save(quantise_model(build()), tmp_path)
    checkpoints.save(build(), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same(checkpoints.load(tmp_path), build())


def test_transformers_refuses_the_mark_by_its_name(tmp_path):
    checkpoints.save(quantise_model(build()), tmp_path)
    with pytest.raises(
        ValueError, match="model type `moe_ref` but Transformers does not recognize"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version=2 of model_type='moe_ref' is not 1"),
        ({"version": None}, "version=None must be a whole number"),
        ({"model_type": "bert"}, f"model_type='bert' is none of {', '.join(checkpoints.FAMILIES)}"),
        ({"modules": []}, "modules=[] must be an object"),
        (
            {"modules": {"blocks.7.mlp.experts": {"bits": 8, "group_size": 32}}},
            "blocks.7.mlp.experts can't be quantised: not a part of this model",
        ),
        (
            {"modules": {"blocks.0.mlp.router": {"bits": 8, "group_size": 32}}},
            "blocks.0.mlp.router is no Experts or Linear of the model",
        ),
        (
            {"modules": {"blocks.0.mlp.experts": {"bits": 5, "group_size": 32}}},
            "blocks.0.mlp.experts: bits=5 is neither 8 nor 4",
        ),
        (
            {"modules": {"blocks.0.mlp.experts": {"bits": 8}}},
            "group_size is missing",
        ),
        (
            {"modules": {"blocks.0.mlp.experts": 8}},
            "blocks.0.mlp.experts: 8 must be an object with bits and group_size",
        ),
    ],
)
def test_a_mark_that_makes_no_sense_is_refused_in_one_line(change, said, tmp_path, unchecked):
    checkpoints.save(quantise_model(build()), tmp_path)
    path = edit(tmp_path, lambda about: about.update(change))
    with pytest.raises(ValueError) as caught:
        checkpoints.load(tmp_path)
    assert str(caught.value) == f"{path}: {said}"


def rewritten(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    tensor = change(tensors.pop(name))
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda codes: None, "is missing"),
        (lambda codes: codes[:-1].clone(), "is [1535], not [1536]"),
        (lambda codes: codes.float(), "is F32, not one of I8"),
    ],
)
def test_codes_that_do_not_fit_are_named(change, said, tmp_path):
    checkpoints.save(quantise_model(build()), tmp_path)
    name = "blocks.0.mlp.experts.gate_up.codes"
    rewritten(tmp_path, name, change)
    with pytest.raises(ValueError, match=re.escape(f"{name} {said}")):
        checkpoints.load(tmp_path)


def test_codes_are_no_weights(tmp_path):
    checkpoints.save(build(), tmp_path)
    rewritten(tmp_path, "model.norm.weight", lambda weight: weight.to(torch.int8))
    with pytest.raises(ValueError, match="model.norm.weight is I8, not one of F64"):
        checkpoints.load(tmp_path)


def test_weights_without_their_mark_are_not_taken_for_others(tmp_path):
    checkpoints.save(quantise_model(build()), tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    settings["model_type"] = settings.pop("quantization_config")["model_type"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="codes is not a tensor of this model"):
        checkpoints.load(tmp_path)
