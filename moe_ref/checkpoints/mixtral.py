"""Mixtral, and Mistral, its dense twin.

Source: Jiang et al. 2024 (2401.04088) and 2023 (2310.06825); the names are those of transformers'
`MixtralForCausalLM` and `MistralForCausalLM`.
"""

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import (
    Layout,
    Place,
    backbone,
    blocks,
    gated,
    read,
    read_backbone,
    refuse_others,
    write_backbone,
)


def layout(config: TransformerConfig) -> Layout:
    """The place of each tensor of a file, by its name."""
    places, names = backbone(config), ("w1", "w3", "w2")
    for layer, (theirs, ours) in enumerate(blocks(config)):
        if not config.is_moe(layer):
            places |= gated(f"{theirs}.mlp", f"{ours}.mlp", config.dense_features)
            continue
        moe, mlp = f"{theirs}.block_sparse_moe", f"{ours}.mlp"
        places[f"{moe}.gate.weight"] = Place(f"{mlp}.router.weight")
        experts, count = (f"{moe}.experts", f"{mlp}.experts"), config.experts_of(layer)
        places |= gated(*experts, config.d_ff, experts=count, names=names)
    return places


def read_config(settings: Mapping[str, Any]) -> TransformerConfig:
    """The model that a config.json describes; ValueError if `Transformer` can't be it."""
    refuse_others(settings, hidden_act="silu")
    moe = settings["model_type"] == "mixtral"
    return TransformerConfig(
        **read_backbone(settings),
        d_ff=read(settings, "intermediate_size", int),
        n_experts=read(settings, "num_local_experts", int) if moe else 0,
        k=read(settings, "num_experts_per_tok", int) if moe else 2,
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The config.json of a model."""
    kind, name = ("mixtral", "Mixtral") if config.has_experts else ("mistral", "Mistral")
    settings = write_backbone(config, kind, f"{name}ForCausalLM")
    settings |= {"intermediate_size": config.d_ff, "sliding_window": config.window_of(0)}
    if config.has_experts:
        settings |= {"num_local_experts": config.experts_of(0), "num_experts_per_tok": config.k}
    return settings
