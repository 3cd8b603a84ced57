"""Checkpoints in the format of Hugging Face's Mixtral (and, if dense, Mistral): safetensors only.

`save` writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` reads, `load` reads
one, also if its weights are in several files. The mathematics of `Transformer` is Mixtral's, so
each tensor of the file is a parameter, or a part of a stacked one: `layout` says which.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .model import Transformer, TransformerConfig


def save(
    model: Transformer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
) -> None:
    """Write config.json and model.safetensors, and tokenizer.json if one is given.

    Args:
        model: all of its blocks MoE, as Mixtral's, or none, as Mistral's.
        folder: made if missing.
        dtype: of the file; None: that of the model.
        tokenizer: a tokenizer.json to put beside the weights, for transformers' AutoTokenizer.

    Raises:
        ValueError: if the model has something that Mixtral has not, such as shared experts.
        OSError: if it can't be written; what stood there before is left as it was.
    """
    config = to_hugging_face(model.config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    tensors = {
        name: parameters[ours].detach()[index].to(dtype or parameters[ours].dtype).cpu().clone()
        for name, (ours, index) in layout(model.config).items()
    }
    config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    write_text(json.dumps(config, indent=2) + "\n", folder / "config.json")
    if tokenizer is not None:
        write_text(Path(tokenizer).read_text(encoding="utf-8"), folder / "tokenizer.json")
        write_text(json.dumps(TOKENIZER, indent=2) + "\n", folder / "tokenizer_config.json")


TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<|pad|>",
    "eos_token": "<|endoftext|>",
}


def load(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """The model of a folder, ready for evaluation.

    Raises:
        FileNotFoundError: if config.json or the weights are missing.
        ValueError: if the configuration asks for what `Transformer` has not, a file is damaged, or
            a tensor is missing, unknown or of the wrong shape; all such tensors are named.
    """
    folder = Path(folder)
    settings = json.loads(_existing(folder / "config.json").read_text(encoding="utf-8"))
    config = from_hugging_face(settings)
    with torch.device(device):
        model = Transformer(config).to(dtype)
    parameters, plan = dict(model.named_parameters()), layout(config)
    missing, wrong = set(plan), []
    for path in weight_files(folder):
        for name, tensor in read_tensors(path).items():
            if name not in plan:
                if not (config.tied and name == "lm_head.weight"):
                    wrong.append(f"{name} is not a tensor of this model")
                continue
            missing.discard(name)
            ours, index = plan[name]
            place = parameters[ours].detach()[index]
            if place.shape != tensor.shape:
                wrong.append(f"{name} is {list(tensor.shape)}, not {list(place.shape)}")
            else:
                place.copy_(tensor)
    wrong += [f"{name} is missing" for name in sorted(missing)]
    if wrong:
        raise ValueError(f"{folder}: " + "; ".join(wrong))
    return model.eval()


# ---------------------------------------------------------------- names


def layout(config: TransformerConfig) -> dict[str, tuple[str, Any]]:
    """For each tensor of a Mixtral or Mistral file, our parameter and the part of it, an index."""
    whole, gate, up = (), slice(0, config.d_ff), slice(config.d_ff, 2 * config.d_ff)
    names: dict[str, tuple[str, Any]] = {"model.embed_tokens.weight": ("embedding.weight", whole)}
    for i in range(config.n_layers):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        names[f"{theirs}.input_layernorm.weight"] = f"{ours}.attention_norm.weight", whole
        for short, long in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
            name = f"{theirs}.self_attn.{short}_proj.weight"
            names[name] = f"{ours}.attention.{long}.weight", whole
        names[f"{theirs}.post_attention_layernorm.weight"] = f"{ours}.mlp_norm.weight", whole
        if not config.n_experts:
            names[f"{theirs}.mlp.gate_proj.weight"] = f"{ours}.mlp.gate_up.weight", gate
            names[f"{theirs}.mlp.up_proj.weight"] = f"{ours}.mlp.gate_up.weight", up
            names[f"{theirs}.mlp.down_proj.weight"] = f"{ours}.mlp.down.weight", whole
            continue
        names[f"{theirs}.block_sparse_moe.gate.weight"] = f"{ours}.mlp.router.weight", whole
        for e in range(config.n_experts):
            expert = f"{theirs}.block_sparse_moe.experts.{e}"
            names[f"{expert}.w1.weight"] = f"{ours}.mlp.experts.gate_up", (e, gate)
            names[f"{expert}.w3.weight"] = f"{ours}.mlp.experts.gate_up", (e, up)
            names[f"{expert}.w2.weight"] = f"{ours}.mlp.experts.down", e
    names["model.norm.weight"] = "norm.weight", whole
    if not config.tied:
        names["lm_head.weight"] = "head.weight", whole
    return names


def to_hugging_face(config: TransformerConfig) -> dict[str, Any]:
    """The config.json of a model; ValueError if it has something that Mixtral has not."""
    options = {"score": "softmax", "renormalize": True, "scale": 1.0, "n_groups": 1}
    options |= {"selection_bias": False}
    for name, value in config.router_options.items():
        if options.get(name, value) != value:
            raise ValueError(f"router_options[{name!r}]={value!r} has no place in Mixtral's format")
    alien = {"every": 1, "d_shared": 0, "router": "top_k", "capacity": math.inf}
    for name, value in alien.items():
        if config.n_experts and getattr(config, name) != value:
            raise ValueError(f"{name}={getattr(config, name)!r} has no place in Mixtral's format")
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_features,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "sliding_window": None,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    if not config.n_experts:
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral"} | common
    experts = {"num_local_experts": config.n_experts, "num_experts_per_tok": config.k}
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"} | common | experts


def from_hugging_face(settings: Mapping[str, Any]) -> TransformerConfig:
    """The configuration that a config.json describes; ValueError if it is of another model."""
    kind = settings.get("model_type")
    if kind not in ("mixtral", "mistral"):
        raise ValueError(f"model_type={kind!r} is neither mixtral nor mistral")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type={rope['rope_type']!r} is not default")
    for name, value in (("hidden_act", "silu"), ("sliding_window", None)):
        if settings.get(name, value) != value:
            raise ValueError(f"{name}={settings[name]!r} is not {value!r}, which is all we have")
    heads, width = settings["num_attention_heads"], settings["hidden_size"]
    if (settings.get("head_dim") or width // heads) * heads != width:
        raise ValueError(f"head_dim={settings['head_dim']} is not hidden_size / heads")
    mixtral = kind == "mixtral"
    return TransformerConfig(
        vocab_size=settings["vocab_size"],
        d_model=width,
        n_layers=settings["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=settings.get("num_key_value_heads"),
        d_ff=settings["intermediate_size"],
        n_experts=settings["num_local_experts"] if mixtral else 0,
        k=settings["num_experts_per_tok"] if mixtral else 2,
        tied=settings.get("tie_word_embeddings", False),
        rope_theta=rope.get("rope_theta") or settings.get("rope_theta") or 10_000.0,
        norm_eps=settings["rms_norm_eps"],
    )


# ---------------------------------------------------------------- files


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [_existing(folder / "model.safetensors")]
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [_existing(folder / name) for name in sorted(set(names))]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file; ValueError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata)
        _settle(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error}; what was there is as it was") from error


LATEST, BEFORE = "training.safetensors", "training.before.safetensors"


def write_next(folder: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write the next checkpoint of a run; of those before it the last one stays."""
    fresh, latest = folder / "training.fresh.safetensors", folder / LATEST
    write_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, fresh, about)
    if latest.exists():
        latest.replace(folder / BEFORE)
    fresh.replace(latest)


def read_last(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and texts of the last checkpoint of a run; ValueError if it is damaged."""
    path = next((p for p in (folder / LATEST, folder / BEFORE) if p.exists()), None)
    if path is None:
        return None
    try:
        tensors = read_tensors(path)
    except ValueError as error:
        hint = "delete it to start afresh"
        if path.name == LATEST and (folder / BEFORE).exists():
            hint = f"delete it to go on from the one before it, {folder / BEFORE}"
        raise ValueError(f"{error}; {hint}") from error
    with safe_open(path, "pt") as file:
        return tensors, dict(file.metadata())


def write_text(text: str, path: Path) -> None:
    """Write a text file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(text.encode("utf-8"))
        _settle(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error}; what was there is as it was") from error


def _settle(partial: Path, path: Path) -> None:
    with partial.open("rb+") as file:
        os.fsync(file.fileno())  # the bytes before the name: a power cut must not swap them
    os.replace(partial, path)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint folder has one")
    return path
