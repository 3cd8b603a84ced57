"""GraniteMoE: factors of the embedding, the residual, the attention and the logits.

Source: IBM 2024, Granite 3.0 language models; the names are those of transformers'
`GraniteMoeForCausalLM`, whose files hold all experts of a layer in one tensor.
"""

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import (
    Layout,
    Place,
    backbone,
    blocks,
    read,
    read_backbone,
    refuse_others,
    write_backbone,
)


def layout(config: TransformerConfig) -> Layout:
    """The place of each tensor of a file, by its name."""
    places = backbone(config)
    for theirs, ours in blocks(config):
        theirs, ours = f"{theirs}.block_sparse_moe", f"{ours}.mlp"
        places[f"{theirs}.router.layer.weight"] = Place(f"{ours}.router.weight")
        places[f"{theirs}.input_linear.weight"] = Place(f"{ours}.experts.gate_up")
        places[f"{theirs}.output_linear.weight"] = Place(f"{ours}.experts.down")
    return places


def read_config(settings: Mapping[str, Any]) -> TransformerConfig:
    """The model that a config.json describes; ValueError if `Transformer` can't be it."""
    refuse_others(settings, hidden_act="silu", sliding_window=None)
    bias = read(settings, "attention_bias", bool, False)
    return TransformerConfig(
        **read_backbone(settings),
        d_ff=read(settings, "intermediate_size", int),
        n_experts=read(settings, "num_local_experts", int),
        k=read(settings, "num_experts_per_tok", int),
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=read(settings, "attention_multiplier", float, 1.0),
        embedding_scale=read(settings, "embedding_multiplier", float, 1.0),
        residual_scale=read(settings, "residual_multiplier", float, 1.0),
        logits_divisor=read(settings, "logits_scaling", float, 1.0),
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The config.json of a model."""
    scale = config.attention_scale
    return write_backbone(config, "granitemoe", "GraniteMoeForCausalLM") | {
        "intermediate_size": config.d_ff,
        "num_local_experts": config.experts_of(0),
        "num_experts_per_tok": config.k,
        "attention_bias": config.qkv_bias,
        "attention_multiplier": config.head_features**-0.5 if scale is None else scale,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": config.logits_divisor,
    }
