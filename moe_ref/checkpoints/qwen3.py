"""Qwen3, MoE and dense: a norm for each head, heads whose width is a setting of its own.

Source: Yang et al. 2025 (2505.09388), section 2; the names are those of transformers'
`Qwen3MoeForCausalLM` and `Qwen3ForCausalLM`. The released MoE models renormalise their weights; the
class default does not.
"""

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import (
    Layout,
    backbone,
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
    return backbone(config) | sparse(config)


def read_config(settings: Mapping[str, Any]) -> TransformerConfig:
    """The model that a config.json describes; ValueError if `Transformer` can't be it."""
    refuse_others(settings, hidden_act="silu")
    shape = read_backbone({"use_sliding_window": False, **settings})
    bias = read(settings, "attention_bias", bool, False)
    shape |= {"qk_norm": "heads", "qkv_bias": bias, "out_bias": bias}
    if settings["model_type"] == "qwen3":
        return TransformerConfig(**shape, d_ff=read(settings, "intermediate_size", int))
    renormalize = read(settings, "norm_topk_prob", bool, False)
    return TransformerConfig(
        **shape,
        **read_sparse(settings),
        router_options={"renormalize": renormalize},
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The config.json of a model."""
    if not config.has_experts:
        settings = write_backbone(config, "qwen3", "Qwen3ForCausalLM")
        settings |= write_windows(config) | {"intermediate_size": config.d_ff}
    else:
        settings = write_backbone(config, "qwen3_moe", "Qwen3MoeForCausalLM")
        settings |= write_windows(config) | write_sparse(config)
        settings["norm_topk_prob"] = config.router_options.get("renormalize", True)
    return settings | {"attention_bias": config.qkv_bias}
