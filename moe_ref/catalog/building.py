"""The configuration that builds a published model, or the nearest one that can be built."""

from typing import Any

from ..config import TransformerConfig

# What a model has and `Transformer` has not, and how its fields show it.
_LACKING = {
    "multi-head latent attention": lambda m: m.attention == "latent",
    "lightning attention": lambda m: m.attention == "lightning",
    "gated delta rules": lambda m: m.attention == "delta",
    "LSTMs": lambda m: m.attention == "lstm",
    "a gate of attention's output": lambda m: m.attention_gate,
    "an encoder": lambda m: m.n_encoder_layers > 0,
    "LayerNorm": lambda m: m.norm == "layer",
    "blocks of more than two norms": lambda m: m.norms_per_block > 2,
    "learned positions": lambda m: m.positions > 0,
    "another activation in dense blocks than in experts": lambda m: m.dense_activation,
    "two levels of routing": lambda m: m.router == "noisy_top_k" and m.n_groups > 1,
    "a bias of the head": lambda m: m.head_bias,
}

# Fields of a model that are those of its configuration, whatever its size.
_SAME = (
    *("k", "shared_mix", "router", "bias", "qk_norm", "qkv_bias", "out_bias", "sinks", "windows"),
    *("rope_theta", "yarn", "tied", "norm_eps", "embedding_scale", "residual_scale"),
    "logits_divisor",
)
_TOP_K = {"score": "softmax", "renormalize": True, "scale": 1.0, "n_groups": 1, "groups_kept": 1}
_TOP_K |= {"selection_bias": False, "logit_bias": False}
_LEAST_VOCABULARY, _LEAST_EXPERTS, _LEAST_RHYTHMS, _LEAST_HEAD, _LEAST_WIDTH = 256, 256, 3, 8, 16


def lacking(m: Any) -> tuple[str, ...]:
    """What a model of the catalogue has and `Transformer` has not."""
    return tuple(words for words, has in _LACKING.items() if has(m)) + m.other_lacks


def config_of(m: Any, shrink: float) -> TransformerConfig:
    """The nearest configuration to a model of the catalogue, divided by `shrink`."""
    experts = tuple(_divided(n, shrink, _LEAST_EXPERTS) for n in _blocks(m.experts, shrink))
    d_head = _width(m.d_head, shrink, _LEAST_HEAD, 2)
    n_heads = max(1, round(m.n_heads * m.d_head / shrink / d_head))
    kv_heads = max(1, round(n_heads * (m.n_kv_heads or m.n_heads) / m.n_heads))
    n_heads = kv_heads * max(1, round(n_heads / kv_heads))
    whole = m.n_heads * m.d_head == m.d_model  # as in the model, the heads make up its width
    same = {name: getattr(m, name) for name in _SAME}
    options = {name: getattr(m, name) for name in _TOP_K if getattr(m, name) != _TOP_K[name]}
    return TransformerConfig(
        vocab_size=_divided(m.vocab_size, shrink, _LEAST_VOCABULARY),
        d_model=n_heads * d_head if whole else _width(m.d_model, shrink, _LEAST_WIDTH, 8),
        n_layers=len(experts),
        n_heads=n_heads,
        n_kv_heads=kv_heads,
        d_head=d_head,
        n_experts=experts[0] if len(set(experts)) == 1 else experts,
        d_ff=_width(m.d_ff, shrink, _LEAST_WIDTH, 8),
        d_dense=_width(m.d_dense, shrink, _LEAST_WIDTH, 8) if m.d_dense else None,
        d_shared=_width(m.d_shared, shrink, _LEAST_WIDTH, 8) if m.d_shared else 0,
        activation=m.dense_activation or m.activation,
        router_options=options if m.router == "top_k" else {},
        # what was chosen for heads of one size holds for them alone
        attention_scale=m.attention_scale if shrink == 1 else None,
        **same,
    )


def _divided(number: int, shrink: float, least: int) -> int:
    """A number divided by `shrink`, but not to below `least`; one below that stays."""
    return min(number, max(least, round(number / shrink)))


def _width(width: int, shrink: float, least: int, step: int) -> int:
    """A width divided by `shrink`, as a multiple of `step`."""
    return width if shrink == 1 else max(least, step * round(width / shrink / step))


def _blocks(experts: tuple[int, ...], shrink: float) -> list[int]:
    """The experts of fewer blocks: from first to last, in whole rhythms of dense and MoE ones."""
    moe = [layer for layer, n in enumerate(experts) if n]
    length = moe[1] - moe[0] if len(moe) > 1 else len(experts)
    rhythms = [experts[start : start + length] for start in range(0, len(experts), length)]
    kept = min(len(rhythms), max(_LEAST_RHYTHMS, round(len(rhythms) / shrink)))
    places = (round(i * (len(rhythms) - 1) / max(1, kept - 1)) for i in range(kept))
    return [n for place in places for n in rhythms[place]]
