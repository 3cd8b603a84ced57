"""Mixtral, and Mistral, its dense twin: the mathematics of `Transformer` is theirs.

Source: Jiang et al. 2024 (2401.04088); the names are those of transformers' `MixtralForCausalLM`
and `MistralForCausalLM`.
"""

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import read


def layout(config: TransformerConfig) -> dict[str, tuple[str, Any]]:
    """For each tensor of a file, a parameter's name and the index of the part it fills."""
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
        for e in range(config.experts_of(i)):
            expert = f"{theirs}.block_sparse_moe.experts.{e}"
            names[f"{expert}.w1.weight"] = f"{ours}.mlp.experts.gate_up", (e, gate)
            names[f"{expert}.w3.weight"] = f"{ours}.mlp.experts.gate_up", (e, up)
            names[f"{expert}.w2.weight"] = f"{ours}.mlp.experts.down", e
    names["model.norm.weight"] = "norm.weight", whole
    if not config.tied:
        names["lm_head.weight"] = "head.weight", whole
    return names


def read_config(settings: Mapping[str, Any]) -> TransformerConfig:
    """The model that a config.json describes; ValueError if `Transformer` can't be it."""
    rope = read(settings, "rope_parameters", dict, None) or read(settings, "rope_scaling", dict, {})
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type={rope['rope_type']!r} is not default")
    for name, value in (("hidden_act", "silu"), ("sliding_window", None)):
        if settings.get(name, value) != value:
            raise ValueError(f"{name}={settings[name]!r} is not {value!r}, which is all we have")
    heads = read(settings, "num_attention_heads", int)
    width = read(settings, "hidden_size", int)
    head_dim = read(settings, "head_dim", int, None)
    if head_dim is not None and head_dim * heads != width:
        raise ValueError(f"head_dim={head_dim} is not hidden_size / num_attention_heads")
    moe = settings["model_type"] == "mixtral"
    return TransformerConfig(
        vocab_size=read(settings, "vocab_size", int),
        d_model=width,
        n_layers=read(settings, "num_hidden_layers", int),
        n_heads=heads,
        n_kv_heads=read(settings, "num_key_value_heads", int, None),
        d_ff=read(settings, "intermediate_size", int),
        n_experts=read(settings, "num_local_experts", int) if moe else 0,
        k=read(settings, "num_experts_per_tok", int) if moe else 2,
        tied=read(settings, "tie_word_embeddings", bool, False),
        rope_theta=read(rope, "rope_theta", float, read(settings, "rope_theta", float, 10_000.0)),
        norm_eps=read(settings, "rms_norm_eps", float),
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The config.json of a model."""
    settings: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM" if config.n_experts else "MistralForCausalLM"],
        "model_type": "mixtral" if config.n_experts else "mistral",
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
    if config.n_experts:
        settings |= {"num_local_experts": config.n_experts, "num_experts_per_tok": config.k}
    return settings
