"""`Transformer` and its checkpoints against transformers' Mixtral and Mistral."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_ref import Transformer, TransformerConfig, checkpoints, generation
from moe_ref.checkpoints.family import Place
from moe_ref.course import corpora
from moe_ref.model import fold_scale
from tests.tools import assert_close

# Mixtral 8x7B, a Mixtral with other sizes, and Mistral 7B, scaled down.
CONFIGS = {
    "mixtral": TransformerConfig(320, 64, 3, 8, 56, n_kv_heads=2, n_experts=8, k=2, rope_theta=1e6),
    "wide": TransformerConfig(320, 48, 2, 2, 16, n_experts=16, k=5, tied=True, norm_eps=1e-6),
    "mistral": TransformerConfig(320, 64, 3, 8, 112, n_kv_heads=2),
    "tied": TransformerConfig(320, 64, 2, 4, 112, tied=True),
}


def pair(name, folder, seed=0):
    torch.manual_seed(seed)
    ours = Transformer(CONFIGS[name])
    checkpoints.save(ours, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return ours, theirs


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("batch", "seq", "seed"), [(1, 1, 0), (2, 17, 1), (3, 64, 2)])
def test_logits_and_all_gradients_are_those_of_transformers(name, batch, seq, seed, tmp_path):
    ours, theirs = pair(name, tmp_path, seed)
    ids = torch.randint(
        1, 320, (batch, seq)
    )  # 0 is padding: theirs gives its embedding no gradient
    weight = torch.randn(batch, seq, 320)
    logits, expected = ours(ids).logits, theirs(ids).logits
    assert_close(logits, expected)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    reference = Transformer(ours.config)
    for parameter in reference.parameters():
        parameter.data.zero_()
    grads = dict(theirs.named_parameters())
    theirs_to_ours = dict(reference.named_parameters())
    for name, place in places(ours.config).items():
        place.of(theirs_to_ours).copy_(grads[name].grad)
    # With one token the attention is sure: the gradients of query and key are all rounding.
    largest = max(parameter.grad.abs().max().item() for parameter in ours.parameters())
    for our_name, parameter in ours.named_parameters():
        assert_close(parameter.grad, theirs_to_ours[our_name].data, floor=largest / 10)


def places(config):
    """Where each parameter of transformers' model in memory belongs; there experts are stacked."""
    found = {}
    for name, place in checkpoints.mixtral.layout(config).items():
        name, inside, _ = name.replace("block_sparse_moe", "mlp").partition(".experts.")
        found |= {} if inside else {name: place}
        for theirs, ours in (("gate_up_proj", "gate_up"), ("down_proj", "down")) if inside else ():
            stacked = f"{place.ours.rpartition('.')[0]}.{ours}"
            found[f"{name}.experts.{theirs}"] = Place(stacked)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_saved_by_transformers_loads_with_the_same_logits(name, tmp_path):
    ours, theirs = pair(name, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    assert len(checkpoints.weight_files(tmp_path / "theirs")) > 1
    loaded = checkpoints.load(tmp_path / "theirs")
    assert loaded.config == dataclasses.replace(ours.config, n_kv_heads=ours.config.kv_heads)
    ids = torch.randint(0, 320, (2, 9))
    assert_close(loaded(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_that_we_split_are_read_by_transformers(name, dtype, tmp_path):
    torch.manual_seed(0)
    ours = Transformer(CONFIGS[name]).to(dtype)
    checkpoints.save(ours, tmp_path, shard_size=100_000)
    assert len(checkpoints.weight_files(tmp_path)) > 1
    theirs, said = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert theirs.dtype == dtype
    assert not any(said.values())
    ids = torch.randint(0, 320, (2, 9))
    assert_close(ours.float()(ids).logits, theirs.float()(ids).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_generation_with_our_cache_is_that_of_transformers(name, tmp_path):
    ours, theirs = pair(name, tmp_path)
    ids = torch.randint(0, 320, (2, 5))
    expected = theirs.generate(
        ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(generation.generate(ours, ids, 12), expected)


def test_a_model_with_a_scale_is_saved_once_the_scale_is_folded(tmp_path):
    torch.manual_seed(0)
    scaled = Transformer(dataclasses.replace(CONFIGS["mixtral"], router_options={"scale": 2**0.5}))
    with pytest.raises(ValueError, match="scale"):
        checkpoints.save(scaled, tmp_path)
    ids = torch.randint(1, 320, (2, 9))
    before = scaled(ids).logits
    checkpoints.save(fold_scale(scaled), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close(theirs(ids).logits, before)


def test_the_tokenizer_beside_the_weights_is_ours(tmp_path):
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(CONFIGS["mixtral"], vocab_size=2048))
    checkpoints.save(model, tmp_path, tokenizer=corpora.data_file("tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for domain in corpora.DOMAINS:
        text = corpora.documents(domain)[0]
        assert theirs(text)["input_ids"] == corpora.tokenizer().encode(text).ids
        assert theirs.decode(theirs(text)["input_ids"]) == text
    assert (theirs.pad_token_id, theirs.eos_token_id) == (corpora.PAD, corpora.END)
