"""The parts of published models, those that `Transformer` can't build among them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .. import cost
from ..cost import Part
from ..ffn import is_gated
from .building import config_of


def parts_of(m: Any) -> tuple[Part, ...]:
    """What a model of the catalogue is made of.

    The nearest model that `Transformer` can build is taken apart, and what differs is replaced.
    """
    found = []
    for part in cost.parts(config_of(m, 1)):
        replacement = _REPLACED.get(part.name)
        found += replacement(m, part) if replacement else [part]
    return tuple(found)


def _attention(m: Any, part: Part) -> list[Part]:
    if m.attention == "grouped":
        return _both_stacks(m, _gated(m, part))
    if m.attention == "lstm":  # four gates of the input and the last output
        return [Part("lstm", 8 * m.d_model**2, places=part.places, width=m.d_model)]
    other = _OTHERS[m.attention](m)
    grouped = part.places // m.full_every if m.full_every else 0
    found = [replace(other, places=part.places - grouped, width=part.width)]
    return [*found, replace(_gated(m, part), places=grouped)] if grouped else found


def _gated(m: Any, part: Part) -> Part:
    gate = m.d_model * m.n_heads * m.d_head * m.attention_gate
    return replace(part, weights=part.weights + gate, flops=part.products + 2 * gate)


def _both_stacks(m: Any, part: Part) -> list[Part]:
    """Attention in the decoder, in the encoder, and from the one to the other."""
    stacks = [part.places, m.n_encoder_layers, m.n_encoder_layers and part.places]
    return [replace(part, places=places) for places in stacks if places]


def _latent(m: Any) -> Part:
    """Queries, and keys and values, by way of a few features; only those are cached.

    `mixing` is that of prefill, where keys and values are computed. A decode step compares with the
    cached features themselves: 2 * n_heads * (2 * kv_rank + d_rope).

    Source: DeepSeek-V2, 2405.04434, section 2.1; the indexer: DeepSeek-V3.2, section 2.1.
    """
    queries = m.n_heads * (m.d_head + m.d_rope)
    pairs = m.n_heads * (m.d_head + m.d_value)
    matrices = (m.d_model + queries) * m.q_rank if m.q_rank else m.d_model * queries
    matrices += m.d_model * (m.kv_rank + m.d_rope) + m.kv_rank * pairs
    matrices += m.n_heads * m.d_value * m.d_model
    index = m.index_heads * (m.q_rank * m.d_index + m.d_model) + m.d_model * m.d_index
    matrices += index if m.index_heads else 0
    norms = m.q_rank + m.kv_rank + (2 * m.d_index if m.index_heads else 0)
    return Part(
        "attention",
        matrices + norms,
        flops=2 * matrices,
        cached=m.kv_rank + m.d_rope + m.d_index,
        mixing=2 * (queries + m.n_heads * m.d_value) + 2 * m.index_heads * m.d_index,
    )


def _lightning(m: Any) -> Part:
    """Linear attention with a gate and a norm: the cache is one matrix a head, whatever was read.

    Source: MiniMax-01, 2501.08313, section 2.2.
    """
    heads = m.n_heads * m.d_head
    state = 4 * heads * m.d_head  # a token writes into the matrix, and reads from it
    return Part("attention", 5 * m.d_model * heads + heads, flops=10 * m.d_model * heads + state)


def _delta(m: Any) -> Part:
    """A gated delta rule: keys, values, two numbers a head and a gate, after a short convolution.

    Source: Gated DeltaNet, 2412.06464, section 3; sizes as in Qwen3-Next's code.
    """
    keys, values = m.linear_key_heads * m.d_linear, m.linear_value_heads * m.d_linear
    matrices = m.d_model * (2 * keys + 2 * values + 2 * m.linear_value_heads) + values * m.d_model
    small = (2 * keys + values) * m.convolution + 2 * m.linear_value_heads + m.d_linear
    state = 6 * values * m.d_linear  # it also takes out what the key stood for
    return Part("attention", matrices + small, flops=2 * matrices + state)


def _norm(m: Any, part: Part) -> list[Part]:
    if m.attention == "lstm":
        return []
    places = m.norms_per_block * m.n_layers + 1
    if m.n_encoder_layers:
        places += m.n_layers + m.norms_per_block * m.n_encoder_layers + 1
    return [replace(part, weights=part.weights * (1 + m.norm_bias), places=places)]


def _feed_forward(m: Any, part: Part) -> list[Part]:
    """With the encoder's, and with its own activation; a stack of LSTMs has none but experts."""
    if part.name != "experts" and m.attention == "lstm":
        return []
    if part.name == "experts" and m.dense_activation:
        matrices = (3 if is_gated(m.activation) else 2) * m.d_model * m.d_ff
        part = replace(part, weights=matrices, flops=2 * matrices)
    return [_twice(m, part)]


def _twice(m: Any, part: Part) -> Part:
    """With the encoder's, which has the same rhythm."""
    return replace(part, places=part.places + part.places * m.n_encoder_layers // m.n_layers)


def _router(m: Any, part: Part) -> list[Part]:
    if m.router != "noisy_top_k" or m.n_groups == 1:
        return [_twice(m, part)]
    second = 2 * m.d_model * m.n_experts // m.n_groups  # weights, and as many of the noise
    return [
        replace(part, weights=2 * m.d_model * m.n_groups, flops=None),
        replace(part, weights=second, n_experts=m.n_groups, k=m.groups_kept, flops=None),
    ]


def _embedding(m: Any, part: Part) -> list[Part]:
    positions = replace(part, weights=m.positions * m.d_model)
    return [part, positions] if m.positions else [part]


def _head(m: Any, part: Part) -> list[Part]:
    return [replace(part, weights=part.weights + m.vocab_size * m.head_bias, flops=part.products)]


_REPLACED: dict[str, Callable[[Any, Part], list[Part]]] = {
    "embedding": _embedding,
    "attention": _attention,
    "norm": _norm,
    "dense": _feed_forward,
    "shared": _feed_forward,
    "experts": _feed_forward,
    "router": _router,
    "head": _head,
}
_OTHERS: dict[str, Callable[[Any], Part]] = {
    "latent": _latent,
    "lightning": _lightning,
    "delta": _delta,
}
