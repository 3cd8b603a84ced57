"""What a family of formats has to provide, and how a config.json is read."""

import dataclasses
import json
import re

import pytest
import torch

from moe_ref import checkpoints
from moe_ref.checkpoints.family import Place

from .common import DENSE, MOE, assert_same, build


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


@pytest.mark.parametrize("kind", checkpoints.LACKING)
def test_a_format_that_can_not_be_built_is_refused_by_what_is_missing(kind, tmp_path):
    path = settings_with(tmp_path, {"model_type": kind})
    with pytest.raises(ValueError) as caught:
        checkpoints.load(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{path}: model_type={kind!r} needs {checkpoints.LACKING[kind]}, which")
    assert said.endswith(f"supported are {', '.join(checkpoints.FAMILIES)}") and "\n" not in said


def test_a_head_may_have_its_own_number_of_features_and_every_query_a_window(tmp_path):
    config = dataclasses.replace(MOE, d_head=6, windows=(3,))
    checkpoints.save(build(config), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sliding_window"] == 3
    loaded = checkpoints.load(tmp_path)
    assert loaded.config == config
    assert_same(loaded, build(config))


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
    with pytest.raises(ValueError, match=r"n_experts=\(0, 4\) has no place in .* other"):
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
        (
            {"model_type": "deepseek_v3"},
            "model_type='deepseek_v3' needs multi-head latent attention",
        ),
        (
            {"model_type": "llama4"},
            "model_type='llama4' needs .* lacks; supported are mixtral, mist",
        ),
        ({"sliding_window": "4096"}, "sliding_window='4096' must be a whole number"),
        ({"sliding_window": 0}, r"windows=\(0,\) must be numbers of at least 1, or None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not 'silu'"),
        ({"head_dim": 7}, "d_head=7"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor is missing"),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            "rope_type='linear' is neither default nor yarn",
        ),
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
