"""Qwen2-MoE: a shared expert with a gate of its own, biases of queries, keys and values.

Source: Yang et al. 2024 (2407.10671), section 2.2.2; the names are those of transformers'
`Qwen2MoeForCausalLM`, which reads Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B.
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
    read_sparse,
    refuse_others,
    sparse,
    write_backbone,
    write_sparse,
    write_windows,
)


def layout(config: TransformerConfig) -> Layout:
    """The place of each tensor of a file, by its name."""
    places = backbone(config) | sparse(config)
    for layer, (theirs, ours) in enumerate(blocks(config)):
        if config.is_moe(layer):
            theirs, ours = f"{theirs}.mlp.shared_expert", f"{ours}.mlp"
            places |= gated(theirs, f"{ours}.shared", config.d_shared)
            places[f"{theirs}_gate.weight"] = Place(f"{ours}.mix.weight")
    return places


def read_config(settings: Mapping[str, Any]) -> TransformerConfig:
    """The model that a config.json describes; ValueError if `Transformer` can't be it."""
    refuse_others(settings, hidden_act="silu")
    return TransformerConfig(
        **read_backbone({"use_sliding_window": False, **settings}),
        **read_sparse(settings),
        d_shared=read(settings, "shared_expert_intermediate_size", int),
        shared_mix="sigmoid",
        router_options={"renormalize": read(settings, "norm_topk_prob", bool, False)},
        qkv_bias=read(settings, "qkv_bias", bool, True),
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The config.json of a model."""
    settings = write_backbone(config, "qwen2_moe", "Qwen2MoeForCausalLM")
    settings |= write_windows(config) | write_sparse(config)
    return settings | {
        "shared_expert_intermediate_size": config.d_shared,
        "norm_topk_prob": config.router_options.get("renormalize", True),
        "qkv_bias": config.qkv_bias,
    }
