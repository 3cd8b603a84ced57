"""Rotary positions and grouped-query attention.

step = prepare(config, x, positions, mask, cache)   # once per forward: angles, who sees whom
y = attention(x, step, layer)                       # in each block
cache.commit()                                      # when every block has stored its keys
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ._validate import check_sizes
from .kv_cache import KVCache, all_equal, check_cache, next_positions


class Attention(nn.Module):
    """Causal attention; n_heads / n_kv_heads heads of queries share a head of keys and values.

    Args:
        d_model: features of a token, of which a head has d_model / n_heads.
        n_heads: heads of queries.
        n_kv_heads: heads of keys and values.

    Raises:
        ValueError: unless 2 * n_heads divides d_model and n_kv_heads divides n_heads.

    Example:
        >>> x = torch.randn(2, 5, 32)
        >>> step = prepare(TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48), x)
        >>> Attention(d_model=32, n_heads=4, n_kv_heads=4)(x, step).shape
        torch.Size([2, 5, 32])

    Source: Vaswani et al. 2017 (1706.03762), equation 1; grouped queries: Ainslie et al. 2023
    (2305.13245).
    """

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        check_heads(d_model, n_heads, n_kv_heads)
        self.n_heads, self.n_kv_heads, self.head_features = n_heads, n_kv_heads, d_model // n_heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, n_kv_heads * self.head_features, bias=False)
        self.value = nn.Linear(d_model, n_kv_heads * self.head_features, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def extra_repr(self) -> str:
        d_model = self.query.in_features
        return f"d_model={d_model}, n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}"

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], step: "Step", layer: int = 0
    ) -> Float[Tensor, "batch seq d_model"]:
        """Mix the tokens of each sequence.

        Args:
            x: hidden states.
            step: from `prepare`, the same for all blocks.
            layer: number of the block, from 0: where in the cache its keys and values are.
        """
        q = rotate(self._split(self.query(x), self.n_heads), step.cos, step.sin)
        k = rotate(self._split(self.key(x), self.n_kv_heads), step.cos, step.sin)
        v = self._split(self.value(x), self.n_kv_heads)
        if step.cache is not None:
            k, v = step.cache.extend(layer, k, v)
        return self.out(attend(q, k, v, step.visible).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor, heads: int) -> Float[Tensor, "batch {heads} seq features"]:
        return x.unflatten(-1, (heads, self.head_features)).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Step:
    """What the blocks of one forward pass share, computed once by `prepare`."""

    cos: Float[Tensor, "rows 1 seq half"]  # of the rotary angles; one row if all would be equal
    sin: Float[Tensor, "rows 1 seq half"]
    visible: Bool[Tensor, "rows 1 seq total"] | None  # keys that a query sees; None: see `attend`
    cache: KVCache | None


def prepare(
    config: Any,
    x: Float[Tensor, "batch seq d_model"],
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    cache: KVCache | None = None,
) -> Step:
    """Work out the positions of the tokens of a forward pass, and which keys each of them sees.

    Args:
        config: the `TransformerConfig` of the model.
        x: the embedded tokens; only their shape, dtype and device matter.
        positions, mask, cache: what `Transformer.forward` was given; the cache is begun.

    Returns:
        What all blocks need.

    Raises:
        ValueError: if positions, mask or cache do not fit the tokens, the model or one another.

    Example:
        >>> config = TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48)
        >>> mask = torch.tensor([[False, True, True]])  # padding on the left
        >>> prepare(config, torch.zeros(1, 3, 32), mask=mask).visible[0, 0, 1:].tolist()
        [[False, True, False], [False, True, True]]
    """
    batch, seq = x.shape[:2]
    real = None  # the mask, on the CPU, if there is any padding
    if mask is not None:
        _check_shape("mask", mask, x, torch.bool)
        real = None if mask.all() else mask.cpu()
    lengths = torch.zeros(batch, dtype=torch.long) if cache is None else cache.lengths
    if cache is not None:
        check_cache(cache, config, x)
        cache.begin(seq, real)
    at = next_positions(lengths, seq, real)
    if positions is not None:
        _check_positions(positions, x, real, None if cache is None else at)
        at = positions if cache is None else at
    alike = real is None and (positions is None if cache is None else all_equal(lengths))
    at = at[:1] if alike else at  # one row will do for all
    visible = None
    if cache is not None:
        if not alike or (seq > 1 and lengths.any()):  # the key of position p has index p
            index = torch.arange(int(at.max()) + 1, device=x.device)
            visible = (index <= at.to(x.device)[..., None])[:, None]
    elif positions is not None or (real is not None and (real[:, 1:] > real[:, :-1]).any()):
        visible = _see_each_other(at.to(x.device), real)  # in any order, or padding before a token
    angles = rotary_angles(at.to(x.device), config.head_features, config.rope_theta)[:, None]
    return Step(angles.cos().to(x.dtype), angles.sin().to(x.dtype), visible, cache)


def attend(
    q: Float[Tensor, "batch heads seq features"],
    k: Float[Tensor, "batch kv_heads total features"],
    v: Float[Tensor, "batch kv_heads total features"],
    visible: Bool[Tensor, "#batch 1 seq total"] | None = None,
) -> Float[Tensor, "batch heads seq features"]:
    """softmax(q k^T / sqrt(features)) v, over the keys that each query sees.

    Without `visible`, queries among as many keys see those up to their own, and a lone query sees
    all. That needs no mask, and so gets torch's fastest kernels.
    """
    causal = visible is None and q.shape[2] == k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=grouped
    )


def rotary_angles(
    positions: Int[Tensor, "*rows seq"], features: int, theta: float
) -> Float[Tensor, "*rows seq half"]:
    """position * theta^(-2i / features), float32. Source: RoFormer, Su et al. 2021 (2104.09864)."""
    exponents = torch.arange(0, features, 2, device=positions.device, dtype=torch.float32)
    return positions.float()[..., None] * theta ** -(exponents / features)


def rotate(
    x: Float[Tensor, "batch heads seq features"],
    cos: Float[Tensor, "#batch 1 seq half"],
    sin: Float[Tensor, "#batch 1 seq half"],
) -> Float[Tensor, "batch heads seq features"]:
    """Turn feature i and feature i + half, as a pair, by angle i of the position."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)  # autocast makes x narrower than the model
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def check_heads(d_model: int, n_heads: int, n_kv_heads: int) -> None:
    """Raise a ValueError unless 2 * n_heads divides d_model and n_kv_heads divides n_heads."""
    check_sizes(d_model=d_model, n_heads=n_heads)
    if d_model % (2 * n_heads):
        raise ValueError(
            f"n_heads={n_heads} does not divide d_model={d_model} into heads of an even number of"
            " features"
        )
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(f"n_kv_heads={n_kv_heads} does not divide n_heads={n_heads}")


def _see_each_other(at: Tensor, real: Tensor | None) -> Tensor:
    """The keys that tokens at these positions see if none were read before."""
    visible = at[:, None, :] <= at[:, :, None]
    if real is not None:  # padding sees itself: a softmax over no key is NaN, which spreads
        itself = torch.eye(at.shape[1], dtype=torch.bool, device=at.device)
        visible = visible & real.to(at.device)[:, None, :] | itself
    return visible[:, None]


def _check_positions(
    positions: Tensor, x: Tensor, real: Tensor | None, follow: Tensor | None
) -> None:
    """Refuse positions below 0; with a cache, all but those that follow it."""
    _check_shape("positions", positions, x, torch.int64, torch.int32)
    given = positions.cpu()
    wrong = given < 0 if follow is None else given != follow
    for row, column in (wrong if real is None else wrong & real).nonzero().tolist():
        right = "0 or more" if follow is None else f"{follow[row, column]}, to follow the cache"
        raise ValueError(f"positions[{row}, {column}]={given[row, column]} must be {right}")


def _check_shape(name: str, given: Tensor, x: Tensor, *dtypes: torch.dtype) -> None:
    if given.shape != x.shape[:2] or given.dtype not in dtypes:
        raise ValueError(
            f"{name}: shape {list(given.shape)}, {given.dtype}; the tokens ask for"
            f" {list(x.shape[:2])}, {dtypes[0]}"
        )
