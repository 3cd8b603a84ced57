"""Each family of checkpoints against transformers, both ways, with released models' settings."""

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_ref import Transformer, catalog, checkpoints, generation
from moe_ref.checkpoints.gpt_oss import decode
from moe_ref.kv_cache import ContiguousCache
from tests.tools import assert_close

from .families import FAMILIES, LENGTH, theirs_of, tokens


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A model of transformers, ours read from its files, and theirs read from ours."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = theirs_of(request.param)
    theirs.save_pretrained(folder / "theirs", max_shard_size="100KB")
    assert len(checkpoints.weight_files(folder / "theirs")) > 1
    ours = checkpoints.load(folder / "theirs")
    checkpoints.save(ours, folder / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours")
    assert type(back) is type(theirs)
    return theirs, ours, back


@torch.no_grad()
def test_logits_are_those_of_transformers_in_both_directions(pair):
    theirs, ours, back = pair
    expected = theirs(tokens()).logits
    assert_close(ours(tokens()).logits, expected)
    assert_close(back(tokens()).logits, ours(tokens()).logits)


def test_all_tensors_come_back_as_they_were(pair):
    theirs, _, back = pair
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_prefill_and_cached_decode_give_the_logits_of_transformers(pair):
    theirs, ours, _ = pair
    expected = theirs(tokens()).logits
    cache = ContiguousCache(ours.config, 2, LENGTH)
    pieces = tokens().split([10, *[1] * (LENGTH - 10)], dim=1)
    logits = torch.cat([ours(piece, cache=cache).logits for piece in pieces], dim=1)
    assert_close(logits, expected)


def test_greedy_text_is_that_of_transformers(pair):
    theirs, ours, _ = pair
    expected = theirs.generate(tokens(seq=6), max_new_tokens=LENGTH, do_sample=False)
    assert torch.equal(generation.generate(ours, tokens(seq=6), LENGTH), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_tied_or_not_and_in_one_file_a_model_is_the_same(name, tied, tmp_path):
    theirs = theirs_of(name, tied)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = checkpoints.load(tmp_path / "theirs")
    assert ours.config.tied == tied
    assert_close(ours(tokens()).logits, theirs(tokens()).logits)
    checkpoints.save(ours, tmp_path / "ours", shard_size=100_000)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_close(back(tokens()).logits, theirs(tokens()).logits)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_in_bfloat16_ours_is_as_near_to_float32_as_transformers_is(name, tmp_path):
    theirs = theirs_of(name).bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = checkpoints.load(tmp_path)
    assert ours.embedding.weight.dtype == torch.bfloat16
    exact = checkpoints.load(tmp_path, dtype=torch.float32)(tokens(16)).logits
    # The median: here and there a token whose scores nearly tie goes to another expert.
    gaps = [(model(tokens(16)).logits - exact).abs().median() for model in (ours, theirs)]
    assert gaps[0] <= 1.2 * gaps[1]


def test_an_olmoe_whose_heads_do_not_make_up_its_width_is_refused(tmp_path):
    """transformers' norms of queries and keys would not fit."""
    fits = catalog.MODELS["olmoe-1b-7b"].config(100)
    checkpoints.save(Transformer(fits), tmp_path)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no place in the format of"):
        checkpoints.save(Transformer(dataclasses.replace(fits, d_head=4)), tmp_path)


def test_experts_in_four_bits_are_decoded_as_by_transformers():
    torch.manual_seed(0)
    blocks = torch.randint(256, (3, 10, 4, 16), dtype=torch.uint8)
    scales = torch.randint(90, 140, (3, 10, 4), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(decode(blocks, scales), expected)


def test_a_released_file_of_gpt_oss_with_experts_in_four_bits_is_the_model_it_stands_for(tmp_path):
    theirs = theirs_of("gpt_oss")
    theirs.save_pretrained(tmp_path / "plain")
    tensors, packed = load_file(tmp_path / "plain" / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors[name].shape
        shape = (experts, outputs, inputs // 32, 16)
        blocks = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 126, shape[:3], dtype=torch.uint8, generator=generator)
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    coded = {n: t for n, t in tensors.items() if f"{n}_blocks" not in packed}
    for folder, content in (("plain", tensors), ("coded", coded | packed)):
        (tmp_path / folder).mkdir(exist_ok=True)
        save_file(content, tmp_path / folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((tmp_path / "plain" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "coded" / "config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    ours = checkpoints.load(tmp_path / "coded", dtype=torch.float32)
    with torch.no_grad():
        assert_close(ours(tokens()).logits, theirs(tokens()).logits)
