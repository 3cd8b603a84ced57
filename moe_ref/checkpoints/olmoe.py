"""OLMoE: one norm for all heads of queries, one for keys; weights that are not renormalised.

Source: Muennighoff et al. 2024 (2409.02060); the names are those of transformers'
`OlmoeForCausalLM`. Its class defaults have experts twice as wide as the released model's.
"""

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Layout, backbone, read, read_backbone, refuse_others, sparse, write_backbone


def layout(config: TransformerConfig) -> Layout:
    """The place of each tensor of a file, by its name."""
    return backbone(config) | sparse(config)


def read_config(settings: Mapping[str, Any]) -> TransformerConfig:
    """The model that a config.json describes; ValueError if `Transformer` can't be it."""
    refuse_others(settings, hidden_act="silu", clip_qkv=None, sliding_window=None)
    bias = read(settings, "attention_bias", bool, False)
    return TransformerConfig(
        **read_backbone(settings),
        d_ff=read(settings, "intermediate_size", int),
        n_experts=read(settings, "num_experts", int),
        k=read(settings, "num_experts_per_tok", int),
        router_options={"renormalize": read(settings, "norm_topk_prob", bool, False)},
        qk_norm="all",
        qkv_bias=bias,
        out_bias=bias,
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The config.json of a model; ValueError if its heads don't make up its width."""
    if config.n_heads * config.head_features != config.d_model:
        raise ValueError("transformers' norms of OLMoE take heads that make up d_model")
    return write_backbone(config, "olmoe", "OlmoeForCausalLM") | {
        "intermediate_size": config.d_ff,
        "num_experts": config.experts_of(0),
        "num_experts_per_tok": config.k,
        "norm_topk_prob": config.router_options.get("renormalize", True),
        "attention_bias": config.qkv_bias,
        "clip_qkv": None,
    }
