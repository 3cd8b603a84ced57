"""Saving and loading; that transformers agrees stands in ../parity/test_models.py."""

import dataclasses
import json
import re
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from moe_ref import Transformer, TransformerConfig, checkpoints
from moe_ref.model import upcycle

from .common import DENSE, MOE, assert_same, build, change


@pytest.mark.parametrize("config", [MOE, DENSE, dataclasses.replace(MOE, tied=True, k=1)])
def test_a_model_comes_back_with_the_same_configuration_and_bits(config, tmp_path):
    model = build(config)
    checkpoints.save(model, tmp_path / "deep" / "folder")
    loaded = checkpoints.load(tmp_path / "deep" / "folder")
    assert loaded.config == config or not config.n_experts
    assert_same(loaded, model)
    assert not loaded.training


def test_dtypes_of_file_and_model_are_those_asked_for(tmp_path):
    model = build()
    checkpoints.save(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    full = checkpoints.load(tmp_path, dtype=torch.float32)
    assert torch.equal(full.head.weight, model.head.weight.bfloat16().float())
    half = checkpoints.load(tmp_path)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.head.weight, model.head.weight.bfloat16())


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


def test_integers_are_not_taken_for_weights(tmp_path):
    checkpoints.save(build(), tmp_path)
    name = "model.norm.weight"
    change(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(ValueError, match=r"model.norm.weight is I8, not one of F64"):
        checkpoints.load(tmp_path)


def test_a_head_that_repeats_a_tied_embedding_is_no_tensor_too_many(tmp_path):
    model = build(DENSE)
    checkpoints.save(model, tmp_path)
    embedding = model.embedding.weight.detach().clone()
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    assert_same(checkpoints.load(tmp_path), model)


def test_a_message_of_many_faults_has_an_end(tmp_path):
    checkpoints.save(build(), tmp_path)
    change(tmp_path, lambda tensors: [tensors.update({f"x.{i}": torch.ones(1)}) for i in range(60)])
    with pytest.raises(ValueError, match=r"x\.53 is not a tensor of this model; and 10 more$"):
        checkpoints.load(tmp_path)


# ----------------------------------------------------------------------------------- several files


@pytest.mark.parametrize("size", [1, 700, 4000])
def test_no_file_holds_more_than_a_shard_unless_a_single_tensor_does(size, tmp_path):
    model = build()
    checkpoints.save(model, tmp_path, shard_size=size)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert not (tmp_path / "model.safetensors").exists()
    assert {path.name for path in files} == set(index["weight_map"].values())
    total = 0
    for path in files:
        tensors = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in tensors)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        assert nbytes <= size or len(tensors) == 1
        total += nbytes
    assert index["metadata"]["total_size"] == total
    assert total == sum(parameter.nbytes for parameter in model.parameters())
    assert_same(checkpoints.load(tmp_path), model)


def test_what_fits_in_a_shard_is_one_file(tmp_path):
    checkpoints.save(build(), tmp_path, shard_size=1_000_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(("first", "second"), [(700, None), (None, 700), (700, 4000)])
def test_weights_that_are_replaced_leave_no_file_behind(first, second, tmp_path):
    checkpoints.save(build(seed=0), tmp_path, shard_size=first)
    (tmp_path / "notes.txt").touch()
    checkpoints.save(build(seed=1), tmp_path, shard_size=second)
    assert_same(checkpoints.load(tmp_path), build(seed=1))
    names = {path.name for path in checkpoints.weight_files(tmp_path)} | {"config.json"}
    names |= set() if second is None else {"model.safetensors.index.json"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"notes.txt"}


@pytest.mark.parametrize("size", [0, -1, 0.5, "5GB"])
def test_an_impossible_size_of_shards_is_refused(size, tmp_path):
    with pytest.raises(ValueError, match="shard_size="):
        checkpoints.save(build(), tmp_path / "model", shard_size=size)
    assert not (tmp_path / "model").exists()


# ------------------------------------------------------------------------- what a format can hold


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_shared": 8}, "d_shared=8 has no place in the format of mixtral"),
        ({"every": 2}, r"n_experts=\(0, 4\) has no place in the format of mixtral"),
        ({"router": "switch", "k": 1}, "router='switch' has no place"),
        ({"capacity_factor": 1.25}, "capacity_factor=1.25 has no place"),
        ({"router_options": {"score": "sigmoid"}}, r"router_options\['score'\]='sigmoid' has no"),
        ({"router_options": {"selection_bias": True}}, r"\['selection_bias'\]=True has no"),
        ({"every": 2, "d_shared": 8}, "shared_mix=None has no place in the format of qwen2_moe"),
    ],
)
def test_a_model_that_mixtral_can_not_express_is_not_saved(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoints.save(build(dataclasses.replace(MOE, **changes)), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(MOE, router_options={"score": "softmax", "scale": 1}, backend="loop"),
        dataclasses.replace(DENSE, k=1, router="switch", d_shared=8, capacity_factor=1.0),
        dataclasses.replace(DENSE, n_kv_heads=4),
    ],
    ids=["defaults, said", "of experts, in a dense model", "as many heads, said"],
)
def test_what_changes_nothing_in_the_model_is_no_reason_to_refuse_it(config, tmp_path):
    checkpoints.save(build(config), tmp_path)
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = build(config).eval()(tokens).logits
        torch.testing.assert_close(checkpoints.load(tmp_path)(tokens).logits, expected)


def test_an_upcycled_model_is_saved_and_comes_back(tmp_path):
    torch.manual_seed(0)
    model = upcycle(Transformer(TransformerConfig(50, 16, 2, 4, 12)), 4).eval()
    checkpoints.save(model, tmp_path)
    tokens = torch.arange(6)[None]
    assert checkpoints.load(tmp_path)(tokens).logits.equal(model(tokens).logits)


# --------------------------------------------------------------------------------------- folders


def test_a_missing_folder_is_named_with_what_it_should_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        checkpoints.load("models/mine")
    said = str(caught.value)
    assert "models/mine is not a folder" in said
    assert str(tmp_path / "models" / "mine") in said
    assert "config.json and model.safetensors" in said
    assert "corpora" not in said
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="model.safetensors is not a folder"):
        checkpoints.load("model.safetensors")


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-dense"])
def test_where_the_models_of_the_course_are_is_said_by_code_that_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="in a clone of the repository") as caught:
        checkpoints.load(f"data/{name}")
    code = re.search(r"`(from .*); (.*)`", str(caught.value))
    scope = {"checkpoints": checkpoints}
    exec(code[1], scope)
    assert isinstance(eval(code[2], scope), Transformer)


# ------------------------------------------------------------------------------------- full disk


FILL = """
import sys, torch
from moe_ref import Transformer, TransformerConfig, checkpoints
from moe_ref.model import upcycle
torch.manual_seed(1)
model = Transformer(TransformerConfig(50, 16, 2, 4, 12, n_kv_heads=2, n_experts=4, k=2))
checkpoints.save(model, sys.argv[1], shard_size=int(sys.argv[2]))
"""


@pytest.mark.parametrize("size", [10**9, 6000])
def test_a_full_disk_leaves_the_checkpoint_that_was_there(size, tmp_path):
    checkpoints.save(build(seed=0), tmp_path, shard_size=size)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    run = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path), str(size)],
        preexec_fn=small_files,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "could not write" in run.stderr and "what was there is as it was" in run.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
