"""Saving and loading; that transformers agrees stands in parity/test_models.py."""

import dataclasses
import json
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_ref import Transformer, TransformerConfig, checkpoints

MOE = TransformerConfig(50, 16, 2, 4, 12, n_kv_heads=2, n_experts=4, k=2)
DENSE = TransformerConfig(50, 16, 2, 4, 12, tied=True)


def build(config=MOE, seed=0):
    torch.manual_seed(seed)
    return Transformer(config)


def change(folder, edit):
    """Rewrite the tensors of a checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("config", [MOE, DENSE, dataclasses.replace(MOE, tied=True, k=1)])
def test_a_model_comes_back_with_the_same_configuration_and_bits(config, tmp_path):
    model = build(config)
    checkpoints.save(model, tmp_path / "deep" / "folder")
    loaded = checkpoints.load(tmp_path / "deep" / "folder")
    assert loaded.config == config or not config.n_experts
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not loaded.training


def test_dtypes_of_file_and_model_are_those_asked_for(tmp_path):
    model = build()
    checkpoints.save(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert checkpoints.load(tmp_path).head.weight.dtype == torch.float32
    half = checkpoints.load(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half.head.weight, model.head.weight.bfloat16())


def test_every_part_of_every_parameter_is_written_once():
    for config in (MOE, DENSE, dataclasses.replace(DENSE, tied=False)):
        model = build(config)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.zero_()
            for ours, index in checkpoints.layout(config).values():
                parameters[ours][index] += 1
        assert all((parameter == 1).all() for parameter in parameters.values())


def test_missing_unknown_and_misshapen_tensors_are_all_named(tmp_path):
    checkpoints.save(build(), tmp_path)

    def edit(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.7.extra"] = torch.zeros(1)
        name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
        tensors[name] = torch.zeros(13, 16)

    change(tmp_path, edit)
    with pytest.raises(ValueError) as caught:
        checkpoints.load(tmp_path)
    assert "model.norm.weight is missing" in str(caught.value)
    assert "model.layers.7.extra is not a tensor of this model" in str(caught.value)
    assert "experts.2.w3.weight is [13, 16], not [12, 16]" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        checkpoints.load(tmp_path)
    checkpoints.save(build(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors does not exist"):
        checkpoints.load(tmp_path)


def test_a_truncated_file_is_called_damaged(tmp_path):
    checkpoints.save(build(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_shared": 8}, "d_shared=8 has no place in Mixtral's format"),
        ({"every": 2}, "every=2 has no place"),
        ({"router": "switch", "k": 1}, "router='switch' has no place"),
        ({"capacity": 1.25}, "capacity=1.25 has no place"),
        ({"router_options": {"score": "sigmoid"}}, r"router_options\['score'\]='sigmoid' has no"),
    ],
)
def test_a_model_that_mixtral_can_not_express_is_not_saved(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoints.save(build(dataclasses.replace(MOE, **changes)), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is neither mixtral nor mistral"),
        ({"sliding_window": 4096}, "sliding_window=4096 is not None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not 'silu'"),
        ({"head_dim": 8}, "head_dim=8 is not hidden_size / heads"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not default"),
    ],
)
def test_a_configuration_of_another_model_is_refused(changes, message, tmp_path):
    checkpoints.save(build(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        checkpoints.load(tmp_path)


FILL = """
import sys, torch
from moe_ref import Transformer, TransformerConfig, checkpoints
torch.manual_seed(1)
model = Transformer(TransformerConfig(50, 16, 2, 4, 12, n_kv_heads=2, n_experts=4, k=2))
checkpoints.save(model, sys.argv[1])
"""


def test_a_full_disk_leaves_the_checkpoint_that_was_there(tmp_path):
    checkpoints.save(build(seed=0), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    run = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path)],
        preexec_fn=small_files,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "could not write" in run.stderr and "what was there is as it was" in run.stderr
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
