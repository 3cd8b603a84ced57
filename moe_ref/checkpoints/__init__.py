"""Checkpoints in Hugging Face's formats: safetensors files beside a config.json.

`save` writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` reads; `load` reads
such a folder, even if the weights are in several files. A module of this package with the functions
of `family.Family` is a family of formats; a line in `FAMILIES` makes it known.
"""

import inspect
import json
import math
from pathlib import Path
from typing import Any

import torch

from .._files import read_object, read_tensors, write_tensors, write_text
from ..config import TransformerConfig
from ..model import Transformer
from ..routers import TopKRouter
from . import mixtral
from .family import Family, read

# By the model_type of config.json. `save` takes the first family that can hold the model.
FAMILIES: dict[str, Family] = {"mixtral": mixtral, "mistral": mixtral}

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
) -> None:
    """Write config.json and model.safetensors, and tokenizer.json if one is given.

    Args:
        model: all of its blocks MoE, as in Mixtral, or none, as in Mistral.
        folder: is made if missing.
        dtype: of the file; None: that of the model.
        tokenizer: a tokenizer.json to put beside the weights, for transformers' AutoTokenizer;
            None: no tokenizer.

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
    family, settings = _written(model.config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    tensors = {
        name: parameters[ours].detach()[index].to(dtype or parameters[ours].dtype).cpu().clone()
        for name, (ours, index) in family.layout(model.config).items()
    }
    settings["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    write_text(json.dumps(settings, indent=2) + "\n", folder / "config.json")
    if tokenizer is not None:
        write_text(Path(tokenizer).read_text(encoding="utf-8"), folder / "tokenizer.json")
        write_text(json.dumps(TOKENIZER, indent=2) + "\n", folder / "tokenizer_config.json")


def load(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """The model of a folder, ready for evaluation. Nothing is downloaded; `save` has an example.

    Args:
        folder: with config.json and model.safetensors, or with several files and their index.
        device: of the model.
        dtype: of the model, whatever the file holds; None: torch's default, usually float32.

    Raises:
        FileNotFoundError: if the folder, config.json or the weights are missing.
        ValueError: if config.json lacks a value or describes what `Transformer` can't be, a file is
            damaged, or a tensor is missing, unknown or of the wrong shape; each is named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(_nowhere(folder))
    path = _existing(folder / "config.json")
    settings = read_object(path)
    try:
        kind = read(settings, "model_type", str)
        if kind not in FAMILIES:
            raise ValueError(f"model_type={kind!r} is none of {', '.join(FAMILIES)}")
        config = FAMILIES[kind].read_config(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with torch.device(device):
        model = Transformer(config).to(dtype or torch.get_default_dtype())
    _fill(model, FAMILIES[kind].layout(config), folder)
    return model.eval()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [_existing(folder / "model.safetensors")]
    files = read_object(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{index}: weight_map must be an object of tensors and their files")
    return [_existing(folder / name) for name in sorted(set(files.values()))]


def _fill(model: Transformer, layout: dict[str, tuple[str, Any]], folder: Path) -> None:
    """Copy the tensors of the files into the model; ValueError names all that do not fit."""
    parameters, missing, wrong = dict(model.named_parameters()), set(layout), []
    for path in weight_files(folder):
        for name, tensor in read_tensors(path).items():
            if name not in layout:
                if not (model.config.tied and name == "lm_head.weight"):
                    wrong.append(f"{name} is not a tensor of this model")
                continue
            missing.discard(name)
            ours, index = layout[name]
            place = parameters[ours].detach()[index]
            if place.shape != tensor.shape:
                wrong.append(f"{name} is {list(tensor.shape)}, not {list(place.shape)}")
            elif not tensor.is_floating_point():
                wrong.append(f"{name} is {tensor.dtype}, not of floating-point numbers")
            else:
                place.copy_(tensor)
    wrong += [f"{name} is missing" for name in sorted(missing)]
    if wrong:
        raise ValueError(f"{folder}: " + "; ".join(wrong))


def _written(config: TransformerConfig) -> tuple[Family, dict[str, Any]]:
    """The first family whose config.json gives the model back as it was, and that config.json."""
    refusals = []
    for family in dict.fromkeys(FAMILIES.values()):
        settings = family.write_config(config)
        before, after = _meaning(config), _meaning(family.read_config(settings))
        # A setting that means nothing to the model read back is lost with another that is named.
        lost = [f"{n}={v!r}" for n, v in before.items() if v != after.get(n, v)]
        if not lost:
            return family, settings
        refusals.append(f"{', '.join(lost)} has no place in the format of {settings['model_type']}")
    raise ValueError("; ".join(refusals))


def _meaning(config: TransformerConfig) -> dict[str, Any]:
    """All that decides what a model computes, with defaults filled in."""
    ignored = {"backend"}
    if not config.n_experts:
        ignored |= {"k", "every", "d_dense", "d_shared", "router", "router_options"}
        ignored |= {"capacity_factor", "capacity_options"}
    fields = vars(config) | {"n_kv_heads": config.kv_heads}
    if config.every == 1:
        fields["d_dense"] = None  # there are no dense blocks among the MoE blocks
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
