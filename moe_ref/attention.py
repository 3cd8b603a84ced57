"""Grouped-query attention over rotary positions.

step = prepare(config, x, positions, mask, cache)   # once per forward: angles, who sees whom
y = attention(x, step, layer)                       # in each block
cache.commit()                                      # when every block has stored its keys
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .kernels.cpu import Linear
from .kv_cache import KVCache, all_equal, check_cache, next_positions
from .rotary import check_heads, cos_sin, rotary_angles, rotate


class Attention(nn.Module):
    """Causal attention; n_heads / n_kv_heads heads of queries share a head of keys and values.

    Args:
        d_model: features of a token.
        n_heads: heads of queries.
        n_kv_heads: heads of keys and values.
        d_head, qk_norm, qkv_bias, out_bias, sinks, norm_eps: as in `TransformerConfig`.
        window: tokens that a query sees at most, itself among them; None: all before it.
        scale: factor of the products of queries and keys; None: 1 / sqrt(d_head).

    Raises:
        ValueError: if the heads can't be formed.

    Example:
        >>> config = TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48)
        >>> x = torch.randn(2, 5, 32)
        >>> Attention(d_model=32, n_heads=4, n_kv_heads=2)(x, prepare(config, x)).shape
        torch.Size([2, 5, 32])

    Source: Vaswani et al. 2017 (1706.03762), equation 1; grouped queries: Ainslie et al. 2023
    (2305.13245); norms: Henry et al. 2020 (2010.04245); windows: Beltagy et al. 2020 (2004.05150);
    sinks: OpenAI 2025 (2508.10925).
    """

    sinks: Tensor | None

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        *,
        d_head: int | None = None,
        qk_norm: str | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        sinks: bool = False,
        window: int | None = None,
        scale: float | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_heads(d_model, n_heads, n_kv_heads, d_head)
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.head_features = d_model // n_heads if d_head is None else d_head
        self.qk_norm, self.window, self.scale = qk_norm, window, scale
        queries, keys = n_heads * self.head_features, n_kv_heads * self.head_features
        self.qkv = Linear(d_model, queries + 2 * keys, bias=qkv_bias)
        self.out = Linear(queries, d_model, bias=out_bias)
        if qk_norm is not None:
            each = qk_norm == "heads"
            self.query_norm = nn.RMSNorm(self.head_features if each else queries, norm_eps)
            self.key_norm = nn.RMSNorm(self.head_features if each else keys, norm_eps)
        self.register_parameter("sinks", nn.Parameter(torch.zeros(n_heads)) if sinks else None)

    def extra_repr(self) -> str:
        d_model = self.qkv.in_features
        said = f"d_model={d_model}, n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}"
        if self.head_features * self.n_heads != d_model:
            said += f", d_head={self.head_features}"
        said += "" if self.window is None else f", window={self.window}"
        return said + ("" if self.sinks is None else ", sinks=True")

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], step: "Step", layer: int = 0
    ) -> Float[Tensor, "batch seq d_model"]:
        """Mix the tokens of each sequence.

        Args:
            x: hidden states.
            step: from `prepare`, the same for all blocks.
            layer: number of the block, from 0: where in the cache its keys and values are.
        """
        n_heads, n_kv_heads = self.n_heads, self.n_kv_heads
        qk, v = self._project(x).split([n_heads + n_kv_heads, n_kv_heads], dim=1)
        q, k = rotate(qk, step.cos, step.sin).split([n_heads, n_kv_heads], dim=1)
        if step.cache is not None:
            k, v = step.cache.extend(layer, k, v)
        visible = step.visible if self.window is None else step.windowed[self.window]
        y = attend(q, k, v, visible, scale=self.scale, sinks=self.sinks)
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], self.out.in_features))

    def _project(self, x: Tensor) -> Float[Tensor, "batch heads seq features"]:
        """Heads of queries, then of keys, then of values."""
        sizes = [self.n_heads, self.n_kv_heads, self.n_kv_heads]
        y, heads = self.qkv(x), (*x.shape[:2], sum(sizes), self.head_features)
        if self.qk_norm is None:
            return y.view(heads).transpose(1, 2)
        each = self.qk_norm == "heads"
        y = y.view(heads) if each else y
        sizes = sizes if each else [self.head_features * size for size in sizes]
        q, k, v = y.split(sizes, dim=2)
        y = torch.cat([self.query_norm(q), self.key_norm(k), v], dim=2)
        return y.view(heads).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Step:
    """What the blocks of one forward pass share, computed once by `prepare`."""

    cos: Float[Tensor, "rows 1 seq features"]  # for `rotate`; one row if all would be equal
    sin: Float[Tensor, "rows 1 seq features"]
    visible: Bool[Tensor, "rows 1 seq total"] | None  # keys that a query sees; None: see `attend`
    windowed: Mapping[int, Bool[Tensor, "rows 1 seq total"] | None]  # the same, for each window
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
    real = _padding(mask, x)
    lengths = torch.zeros(batch, dtype=torch.long) if cache is None else cache.lengths
    if cache is not None:
        check_cache(cache, config, x)
        cache.begin(seq, real)
    at = next_positions(lengths, seq, real)
    if positions is not None:
        _check_positions(positions, x, real, None if cache is None else at)
        at = positions if cache is None else at
    alike = real is None and (positions is None if cache is None else all_equal(lengths))
    if cache is None:
        masked = positions is not None or (real is not None and (real[:, 1:] > real[:, :-1]).any())
        reach = seq if positions is None else math.inf
    else:
        masked = not alike or (seq > 1 and bool(lengths.any()))
        reach = int(at.max()) + 1
    at = (at[:1] if alike else at).to(x.device)  # one row will do for all
    visible, windowed = _visible(at, real, bool(masked), config.windows, reach, cache is not None)
    angles = rotary_angles(at, config.head_features, config.rope_theta, config.yarn)[:, None]
    cos, sin = cos_sin(angles, 1.0 if config.yarn is None else config.yarn.amplitude)
    return Step(cos.to(x.dtype), sin.to(x.dtype), visible, windowed, cache)


def attend(
    q: Float[Tensor, "batch heads seq features"],
    k: Float[Tensor, "batch kv_heads total features"],
    v: Float[Tensor, "batch kv_heads total features"],
    visible: Bool[Tensor, "#batch 1 seq total"] | None = None,
    *,
    scale: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads seq features"]:
    """softmax(scale q k^T) v, over the keys that each query sees; `scale` is 1 / sqrt(features).

    Without `visible`, queries among as many keys see those up to their own, and a lone query sees
    all. That needs no mask, and so gets torch's fastest kernels. A sink is the logit of one more
    key, whose value is 0.
    """
    causal = visible is None and q.shape[2] == k.shape[2]
    mask: Tensor | None = visible
    if sinks is not None:
        mask, causal = _with_sinks(q, k, visible, sinks), False
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _with_sinks(
    q: Tensor, k: Tensor, visible: Tensor | None, sinks: Tensor
) -> Float[Tensor, "#batch heads seq total_and_sink"]:
    """What is added to the logits: 0 for a key that is seen, and the sink for one key more."""
    seq, total = q.shape[2], k.shape[2]
    if visible is None:
        visible = torch.ones(1, 1, seq, total, dtype=torch.bool, device=q.device).tril(total - seq)
    added = torch.zeros(visible.shape, dtype=q.dtype, device=q.device)
    added = added.masked_fill(~visible, -torch.inf).expand(-1, len(sinks), -1, -1)
    column = sinks.to(q.dtype)[None, :, None, None].expand(len(added), -1, seq, 1)
    return torch.cat([added, column], dim=-1)


def _visible(
    at: Int[Tensor, "rows seq"],
    real: Tensor | None,
    masked: bool,
    windows: Iterable[int | None],
    reach: float,
    cached: bool,
) -> tuple[Tensor | None, dict[int, Tensor | None]]:
    """The keys that queries at these positions see: without a window, and for each window.

    None is what `attend` does without a mask, unless `masked`. No window reaches further back than
    `reach`. In a cache, the key of position p has index p, and only what is real was stored.
    """
    widths = {window for window in windows if window is not None}
    if not masked and all(reach <= window for window in widths):
        return None, dict.fromkeys(widths)
    keys = torch.arange(int(reach), device=at.device)[None] if cached else at
    own = None if cached else real
    visible = _sees(at, keys, own) if masked else None
    windowed = {w: visible if reach <= w else _sees(at, keys, own, w) for w in widths}
    return visible, windowed


def _sees(
    at: Int[Tensor, "rows seq"],
    keys: Int[Tensor, "#rows total"],
    real: Tensor | None,
    window: int | None = None,
) -> Bool[Tensor, "rows 1 seq total"]:
    """Which keys, at their positions, each query sees; `real` is False at keys of padding."""
    keys, queries = keys[:, None, :], at[..., None]
    visible = keys <= queries
    if window is not None:
        visible = visible & (keys > queries - window)
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


def _padding(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask, on the CPU, if there is any padding."""
    if mask is None:
        return None
    _check_shape("mask", mask, x, torch.bool)
    return None if mask.all() else mask.cpu()


def _check_shape(name: str, given: Tensor, x: Tensor, *dtypes: torch.dtype) -> None:
    if given.shape != x.shape[:2] or given.dtype not in dtypes:
        raise ValueError(
            f"{name}: shape {list(given.shape)}, {given.dtype}; the tokens ask for"
            f" {list(x.shape[:2])}, {dtypes[0]}"
        )
