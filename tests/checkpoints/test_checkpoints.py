"""Saving and loading; that transformers agrees stands in ../parity/test_models.py."""

import dataclasses
import json
import re
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_ref import Transformer, TransformerConfig, checkpoints
from moe_ref.checkpoints.family import Place
from moe_ref.model import upcycle

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
    full = checkpoints.load(tmp_path, dtype=torch.float32)
    assert torch.equal(full.head.weight, model.head.weight.bfloat16().float())
    half = checkpoints.load(tmp_path)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.head.weight, model.head.weight.bfloat16())


def test_every_part_of_every_parameter_is_written_once():
    for config in (MOE, DENSE, dataclasses.replace(DENSE, tied=False)):
        model = build(config)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.zero_()
            for place in checkpoints.mixtral.layout(config).values():
                place.of(parameters).add_(1)
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


def test_integers_are_not_taken_for_weights(tmp_path):
    checkpoints.save(build(), tmp_path)
    name = "model.norm.weight"
    change(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(ValueError, match=r"model.norm.weight is I8, not of floating"):
        checkpoints.load(tmp_path)


# ------------------------------------------------------------------------- what a format can hold


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_shared": 8}, "d_shared=8 has no place in the format of mixtral"),
        ({"every": 2}, "every=2 has no place"),
        ({"router": "switch", "k": 1}, "router='switch' has no place"),
        ({"capacity_factor": 1.25}, "capacity_factor=1.25 has no place"),
        ({"router_options": {"score": "sigmoid"}}, r"router_options\['score'\]='sigmoid' has no"),
        ({"router_options": {"selection_bias": True}}, r"\['selection_bias'\]=True has no"),
        ({"every": 2, "d_shared": 8}, "every=2, d_shared=8 has no place"),
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


class Other:
    """A format of another name, whose norm is called otherwise, and which holds shared blocks."""

    @staticmethod
    def layout(config):
        names = checkpoints.mixtral.layout(config)
        names["final.weight"] = names.pop("model.norm.weight")
        for i in range(config.n_layers):
            for part in ("gate_up", "down"):
                name = f"blocks.{i}.mlp.shared.{part}.weight"
                names[name] = Place(name)
        return names

    @staticmethod
    def read_config(settings):
        config = checkpoints.mixtral.read_config(settings | {"model_type": "mixtral"})
        return dataclasses.replace(config, d_shared=settings["shared_size"])

    @staticmethod
    def write_config(config):
        settings = checkpoints.mixtral.write_config(config)
        return settings | {"model_type": "other", "shared_size": config.d_shared}


def test_an_upcycled_model_is_saved_and_comes_back(tmp_path):
    torch.manual_seed(0)
    model = upcycle(Transformer(TransformerConfig(50, 16, 2, 4, 12)), 4).eval()
    checkpoints.save(model, tmp_path)
    tokens = torch.arange(6)[None]
    assert checkpoints.load(tmp_path)(tokens).logits.equal(model(tokens).logits)


def test_a_family_is_three_functions_and_a_line_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoints.FAMILIES, "other", Other)
    config = dataclasses.replace(MOE, d_shared=8)
    model = build(config)
    checkpoints.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "other"
    loaded = checkpoints.load(tmp_path)
    assert loaded.config == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    checkpoints.save(build(), tmp_path)  # the first family that can hold a model gets it
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mixtral"
    with pytest.raises(ValueError, match=r"every=2, d_shared=8 .* mixtral; every=2 .* of other"):
        checkpoints.save(build(dataclasses.replace(config, every=2)), tmp_path)


class DenseOnly(Other):
    """A family that can hold no experts."""

    @staticmethod
    def write_config(config):
        dense = dataclasses.replace(config, n_experts=0)
        return checkpoints.mixtral.write_config(dense) | {"model_type": "dense", "shared_size": 0}

    @staticmethod
    def read_config(settings):
        return checkpoints.mixtral.read_config(settings | {"model_type": "mistral"})


def test_a_family_of_dense_models_leaves_a_moe_model_to_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FAMILIES", {"dense": DenseOnly, **checkpoints.FAMILIES})
    checkpoints.save(build(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mixtral"
    monkeypatch.setattr(checkpoints, "FAMILIES", {"dense": DenseOnly})
    with pytest.raises(ValueError, match="n_experts=4 has no place in the format of dense"):
        checkpoints.save(build(), tmp_path)


# ---------------------------------------------------------------------------------- config.json


def settings_with(folder, changes):
    """A saved model's config.json with some values changed, or left out where they are None."""
    checkpoints.save(build(), folder)
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is none of mixtral, mistral"),
        ({"model_type": ["mixtral"]}, r"model_type=\['mixtral'\] must be a text"),
        ({"sliding_window": 4096}, "sliding_window=4096 is not None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not 'silu'"),
        ({"head_dim": 8}, "head_dim=8 is not hidden_size / num_attention_heads"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not default"),
        ({"rope_parameters": 10_000}, "rope_parameters=10000 must be an object"),
        ({"hidden_size": "16"}, "hidden_size='16' must be a whole number"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers=2.0 must be a whole number"),
        ({"num_local_experts": True}, "num_local_experts=True must be a whole number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
        ({"num_attention_heads": 0, "head_dim": None}, "n_heads=0 must be at least 1"),
    ],
)
def test_a_configuration_of_another_model_is_refused(changes, message, tmp_path):
    path = settings_with(tmp_path, changes)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {message}"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_local_experts",
        "num_experts_per_tok",
        "rms_norm_eps",
    ],
)
def test_a_missing_value_is_named_with_its_file(key, tmp_path):
    path = settings_with(tmp_path, {key: None})
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {key} is missing"):
        checkpoints.load(tmp_path)


def test_what_a_configuration_may_leave_out_has_the_value_of_transformers(tmp_path):
    optional = ("num_key_value_heads", "head_dim", "hidden_act", "rope_theta", "rope_parameters")
    path = settings_with(tmp_path, dict.fromkeys(optional))
    with pytest.raises(ValueError, match=r"k_proj.weight is \[8, 16\], not \[16, 16\]"):
        checkpoints.load(tmp_path)  # now every head has keys of its own
    settings = json.loads(path.read_text()) | {"num_key_value_heads": 2}
    path.write_text(json.dumps(settings))
    assert checkpoints.load(tmp_path).config == MOE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n  "model_type": }', r"config.json is not JSON: .*line 2 column 17"),
        (b"", r"config.json is not JSON: .*line 1 column 1"),
        (b'{"model_type": "\xff"}', r"config.json is not JSON: .*position 16"),
        (b"[1, 2]", r"config.json must hold an object, \{...\}, not a list"),
    ],
)
def test_a_configuration_that_is_no_object_of_json_is_refused_by_place(content, message, tmp_path):
    checkpoints.save(build(), tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(tmp_path)


# ------------------------------------------------------------------------------- several files


def shard(folder, index=None):
    """Split a checkpoint's weights in two files with an index, or with the one given."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    text = json.dumps({"weight_map": files}) if index is None else index
    (folder / "model.safetensors.index.json").write_text(text)


def test_weights_in_several_files_are_read_by_their_index(tmp_path):
    model = build()
    checkpoints.save(model, tmp_path)
    shard(tmp_path)
    loaded = checkpoints.load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-1.safetensors does not exist"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": ', r"index.json is not JSON: .*line 1 column 16"),
        ("[]", "index.json must hold an object"),
        ("{}", "index.json: weight_map must be an object"),
        ('{"weight_map": ["model-0.safetensors"]}', "index.json: weight_map must be an object"),
        ('{"weight_map": {"model.norm.weight": 0}}', "index.json: weight_map must be an object"),
    ],
)
def test_a_broken_index_is_named(index, message, tmp_path):
    checkpoints.save(build(), tmp_path)
    shard(tmp_path, index)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(tmp_path)


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
