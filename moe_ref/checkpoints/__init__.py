"""Checkpoints in Hugging Face's formats: safetensors files beside a config.json.

`save` writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` reads; `load` reads
such a folder, even if the weights are in several files. A module of this package with the functions
of `family.Family` is a family of formats; a line in `FAMILIES` makes it known.
"""

import dataclasses
import inspect
import json
import math
from pathlib import Path
from typing import Any, cast

import torch

from .._files import read_object
from .._validate import check_sizes
from ..config import TransformerConfig
from ..layer import MoELayer
from ..model import Transformer, make_mlp
from ..quantise import Model, Plan, plan_of
from ..routers import TopKRouter
from . import gpt_oss, granite, mixtral, olmoe, qwen2_moe, qwen3
from .family import Family, Layout, read
from .folder import weight_files as weight_files
from .quantised import places, quantised, read_mark, write_mark
from .reading import read_into
from .writing import write_model

# By the model_type of config.json. `save` takes the first family that can hold the model.
FAMILIES: dict[str, Family] = {
    "mixtral": mixtral,
    "mistral": mixtral,
    "olmoe": olmoe,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3,
    "qwen3": qwen3,
    "granitemoe": granite,
    "gpt_oss": gpt_oss,
}

# What `Transformer` lacks, by the model_type of other formats.
MLA, LINEAR = "multi-head latent attention", "linear attention"
PARTIAL = "rotary positions for a part of each head"
LACKING = {
    "arctic": "a dense block with a norm of its own beside the experts",
    "dbrx": "LayerNorm, and queries, keys and values that are clipped",
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "glm4_moe": PARTIAL,
    "glm4_moe_lite": MLA,
    "granitemoehybrid": "Mamba layers",
    "jamba": "Mamba layers",
    "kimi_k2": MLA,
    "llama4": "attention in chunks, and blocks without rotary positions",
    "llama4_text": "attention in chunks, and blocks without rotary positions",
    "longcat_flash": MLA,
    "minimax": LINEAR,
    "minimax_m2": PARTIAL,
    "minimax_text_01": LINEAR,
    "nllb-moe": "an encoder",
    "phimoe": "LayerNorm, and SparseMixer routing",
    "qwen3_5_moe": LINEAR,
    "qwen3_next": LINEAR,
    "switch_transformers": "an encoder",
}

TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<|pad|>",
    "eos_token": "<|endoftext|>",
}


def save(
    model: Transformer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    shard_size: int | None = None,
) -> None:
    """Write config.json and model.safetensors, and tokenizer.json if one is given.

    Weights that the folder had before are replaced, whether they were in one file or in several.

    Args:
        model: all of its blocks MoE, as in Mixtral, or none, as in Mistral.
        folder: is made if missing.
        dtype: of the file; None: that of the model.
        tokenizer: a tokenizer.json to put beside the weights, for transformers' AutoTokenizer;
            None: no tokenizer.
        shard_size: bytes of weights in a file at most, but for a single tensor that is larger.
            What needs more is written as several files and model.safetensors.index.json. None: all
            is in one file.

    Raises:
        ValueError: if the model has something that no format here can hold.
        OSError: if a file can't be written; the one there before is left as it was.

    Example:
        >>> import tempfile
        >>> model = Transformer(TransformerConfig(50, 16, 2, 4, 12, n_experts=4, k=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, folder)
        ...     torch.equal(load(folder).head.weight, model.head.weight)
        True
    """
    if shard_size is not None:
        check_sizes(shard_size=shard_size)
    family, settings = _written(model.config)
    settings["dtype"] = str(dtype or model.embedding.weight.dtype).removeprefix("torch.")
    settings = write_mark(settings, model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"config.json": json.dumps(settings, indent=2) + "\n"}
    if tokenizer is not None:
        texts["tokenizer.json"] = Path(tokenizer).read_text(encoding="utf-8")
        texts["tokenizer_config.json"] = json.dumps(TOKENIZER, indent=2) + "\n"
    layout = places(family.layout(model.config), plan_of(model))
    write_model(model.state_dict(), layout, folder, dtype, shard_size, texts)


def load(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    layers: slice | None = None,
) -> Transformer:
    """The model of a folder, ready for evaluation. Nothing is downloaded; `save` has an example.

    The tensors are read straight to where they belong, so that memory holds the model once. If
    that takes more than a few seconds, tqdm shows a bar, where it is installed.

    Args:
        folder: with config.json and model.safetensors, or with several files and their index.
        device: of the model.
        dtype: of the model, whatever the file holds; None: the file's. If a file has several, each
            router keeps its own, and all else gets that of most numbers.
        layers: the blocks to read, for a model that does not fit: `slice(3, 5)` gives a model of
            blocks 3 and 4, with the embedding and the head. None: all.

    Raises:
        FileNotFoundError: if the folder, config.json or the weights are missing.
        ValueError: if config.json lacks a value or describes what `Transformer` can't be, a file is
            damaged, or a tensor is missing, unknown or of the wrong shape; each is named.
    """
    folder = Path(folder)
    whole, config, plan = _described(folder)
    layout = whole
    if layers is not None:
        numbers = range(config.n_layers)[layers]
        if not numbers:
            raise ValueError(f"layers={layers} is none of the {config.n_layers} blocks")
        layout = {n: place for n, place in whole.items() if not place.ours.startswith("blocks.")}
        for i, number in enumerate(numbers):
            layout |= _block(whole, number, "", f"blocks.{i}.")
        config = _only(config, numbers)
    with torch.device("meta"):
        model = _quantised(Transformer(config), layout, plan, folder)
    part = None if layers is None else whole
    read_into(model, layout, folder, whole=part, device=device, dtype=dtype)
    return model.eval()


def layer(
    folder: str | Path,
    number: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> MoELayer:
    """The MoE layer of one block. Of a published model, the file that holds this block will do.

    Args:
        folder: with config.json and the safetensors files that hold the block; their index may be
            missing.
        number: of the block, from 0.
        device, dtype: as in `load`.

    Raises:
        FileNotFoundError, ValueError: as `load` does; and if the block has no experts.

    Example:
        >>> import tempfile
        >>> model = Transformer(TransformerConfig(50, 16, 2, 4, 12, n_experts=4, k=2)).eval()
        >>> x = torch.randn(3, 16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, folder)
        ...     torch.equal(layer(folder, 1)(x)[0], model.blocks[1].mlp(x)[0])
        True
    """
    folder = Path(folder)
    whole, config, plan = _described(folder)
    numbers = [i for i in range(config.n_layers) if config.is_moe(i)]
    if number not in numbers:
        raise ValueError(f"number={number!r} is no block with experts; these are: {numbers}")
    layout = _block(whole, number, "mlp.", "")
    with torch.device("meta"):
        module = cast(MoELayer, make_mlp(config, number))
        module = _quantised(module, layout, plan, folder)
    read_into(module, layout, folder, whole=whole, device=device, dtype=dtype)
    return module.eval()


def _quantised(module: Model, layout: Layout, plan: Plan, folder: Path) -> Model:
    try:
        return quantised(module, layout, plan)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def _described(folder: Path) -> tuple[Layout, TransformerConfig, Plan]:
    """The places, the model, and what of it is quantised, as a folder's config.json has them."""
    if not folder.is_dir():
        raise FileNotFoundError(_nowhere(folder))
    path = _existing(folder / "config.json")
    try:
        settings, plan = read_mark(read_object(path))
        kind = read(settings, "model_type", str)
        if kind in LACKING and kind not in FAMILIES:
            raise ValueError(
                f"model_type={kind!r} needs {LACKING[kind]}, which `Transformer` lacks; supported"
                f" are {', '.join(FAMILIES)}"
            )
        if kind not in FAMILIES:
            raise ValueError(f"model_type={kind!r} is none of {', '.join(FAMILIES)}")
        config = FAMILIES[kind].read_config(settings)
        layout = FAMILIES[kind].layout(config)
        about = read(settings, "quantization_config", dict, {})
        if about and not any(place.coded for place in layout.values()):
            method = about.get("quant_method")
            raise ValueError(f"quant_method={method!r}: quantised weights of {kind} are not read")
        return places(layout, plan), config, plan
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _block(layout: Layout, number: int, part: str, ours: str) -> Layout:
    """The places in a part of a block, with names that begin with `ours` instead."""
    prefix = f"blocks.{number}.{part}"
    return {
        name: dataclasses.replace(place, ours=ours + place.ours.removeprefix(prefix))
        for name, place in layout.items()
        if place.ours.startswith(prefix)
    }


def _only(config: TransformerConfig, numbers: range) -> TransformerConfig:
    """A model of some blocks of another, each of the kind that it was."""
    experts = tuple(config.experts_of(number) for number in numbers)
    windows = tuple(config.window_of(number) for number in numbers)
    part: dict[str, Any] = {"n_layers": len(numbers), "windows": windows, "every": 1}
    part["n_experts"] = experts if any(experts) else 0
    if not any(experts):
        part["d_ff"] = config.dense_features
    return dataclasses.replace(config, **part)


def _written(config: TransformerConfig) -> tuple[Family, dict[str, Any]]:
    """The first family whose config.json gives the model back as it was, and that config.json."""
    refusals = []
    for family in dict.fromkeys(FAMILIES.values()):
        try:
            settings = family.write_config(config)
            before, after = _meaning(config), _meaning(family.read_config(settings))
        except ValueError:  # what it needs, such as a shared expert, the model does not have
            continue
        # A setting that means nothing to the model read back is lost with another that is named.
        lost = [f"{n}={v!r}" for n, v in before.items() if v != after.get(n, v)]
        if not lost:
            return family, settings
        refusals.append((lost, settings["model_type"]))
    least = min(len(lost) for lost, _ in refusals)
    nearest = [
        f"{', '.join(lost)} has no place in the format of {kind}"
        for lost, kind in refusals
        if len(lost) == least
    ]
    raise ValueError("; ".join(nearest))


def _meaning(config: TransformerConfig) -> dict[str, Any]:
    """All that decides what a model computes, with defaults filled in."""
    numbers = [config.experts_of(layer) for layer in range(config.n_layers)]
    ignored = {"backend", "every", "d_head"}
    if not config.has_experts:
        ignored |= {"k", "d_dense", "d_shared", "shared_mix", "router", "router_options"}
        ignored |= {"capacity_factor", "capacity_options"}
    if all(numbers):
        ignored |= {"d_dense"}  # there are no dense blocks among the MoE blocks
    fields = vars(config) | {
        "n_kv_heads": config.kv_heads,
        "n_experts": numbers[0] if len(set(numbers)) == 1 else tuple(numbers),
        "d_dense": config.dense_features,
        "head_features": config.head_features,
        "windows": tuple(config.window_of(layer) for layer in range(config.n_layers)),
        "attention_scale": config.attention_scale or config.head_features**-0.5,
    }
    if math.isinf(config.capacity_factor):
        fields["capacity_options"] = {}
    options = fields.pop("router_options")
    for name, option in inspect.signature(TopKRouter).parameters.items():
        fields[f"router_options[{name!r}]"] = options.get(name, option.default)
    return {name: value for name, value in fields.items() if name.split("[")[0] not in ignored}


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint folder has one")
    return path


def _nowhere(folder: Path) -> str:
    said = (
        f"{folder} is not a folder (looked for at {folder.absolute()}). A checkpoint is a folder"
        " that holds config.json and model.safetensors, or several such files and their index"
    )
    if folder.name in ("tiny-moe", "tiny-dense"):
        said += (
            ". The course's own models are in a clone of the repository, not in the installed"
            " package. In a clone, corpora.data_file finds them from any folder: `from"
            f' moe_ref.course import corpora; checkpoints.load(corpora.data_file("{folder.name}"))`'
        )
    return said
