"""The shape of a `Transformer`: sizes, experts, attention, and the factors of released models."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ._validate import check_choice, check_sizes
from .ffn import is_gated
from .rotary import Yarn, check_heads
from .routers import ROUTERS


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a `Transformer`; without `n_experts` every block is dense.

    Args:
        vocab_size: number of token ids.
        d_model: features of a token.
        n_layers: blocks.
        n_heads: heads of queries.
        d_ff: hidden features of a dense block, or of each expert.
        n_kv_heads: heads of keys and values, each shared by n_heads / n_kv_heads heads of queries;
            None: n_heads.
        n_experts: experts of an MoE block; 0: no block is MoE. A tuple has the number of each
            block, 0 for a dense one.
        k: experts that serve a token.
        every: 1: all blocks are MoE; 2: every second one, the second first; and so on.
        d_dense: hidden features of the dense blocks among MoE blocks; None: k * d_ff, which costs
            the same FLOPs.
        d_shared: hidden features of a shared expert, which every token visits; 0: none.
        shared_mix: how the shared expert's output joins the others': "sigmoid" or "softmax", as in
            `layer.Mix`; None: it is added.
        router: a name in `routers.ROUTERS`, or a class of your own: see `routers.Router`.
        router_options: further keyword arguments of its constructor.
        capacity_factor: factor of `Capacity`; infinity: no limit.
        capacity_options: further keyword arguments of `Capacity`.
        activation: of all feed-forward parts, a name in `ffn.ACTIVATIONS`.
        bias: whether each projection of the feed-forward parts adds one.
        d_head: features of a head; None: d_model / n_heads.
        qk_norm: RMSNorm of queries and keys before they are rotated: "heads", each head by itself;
            "all", all heads of a token together; None: there is none.
        qkv_bias: whether the projections to queries, keys and values add one.
        out_bias: whether the projection after the heads adds one.
        sinks: whether each head has a learned logit that takes part in the softmax and has no
            value, so that a head can attend to nothing.
        windows: tokens that a query sees at most, itself among them; None: all before it. One
            entry for each block, repeated as often as needed.
        attention_scale: factor of the products of queries and keys; None: 1 / sqrt(d_head).
        rope_theta: base of the rotary angles.
        yarn: slower angles, for longer texts.
        tied: whether the head has the embedding's weight.
        embedding_scale: factor of the embedded tokens.
        residual_scale: factor of what a block's two parts add.
        logits_divisor: what the logits are divided by.
        norm_eps: added to the mean square in RMSNorm.
        backend: of the `Experts`.

    Raises:
        ValueError: if a size is impossible or a name unknown.

    Example:
        >>> config = TransformerConfig(100, 32, 4, n_heads=4, d_ff=48, n_experts=8, every=2)
        >>> [config.experts_of(layer) for layer in range(4)]
        [0, 8, 0, 8]
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    n_kv_heads: int | None = None
    n_experts: int | tuple[int, ...] = 0
    k: int = 2
    every: int = 1
    d_dense: int | None = None
    d_shared: int = 0
    shared_mix: str | None = None
    router: str | Callable[..., Any] = "top_k"
    router_options: Mapping[str, Any] = field(default_factory=dict)
    capacity_factor: float = math.inf
    capacity_options: Mapping[str, Any] = field(default_factory=dict)
    activation: str = "swiglu"
    bias: bool = False
    d_head: int | None = None
    qk_norm: str | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False
    windows: tuple[int | None, ...] = (None,)
    attention_scale: float | None = None
    rope_theta: float = 10_000.0
    yarn: Yarn | None = None
    tied: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    norm_eps: float = 1e-5
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_sizes(vocab_size=self.vocab_size, n_layers=self.n_layers, d_ff=self.d_ff)
        check_sizes(every=self.every, k=self.k)
        check_heads(self.d_model, self.n_heads, self.kv_heads, self.d_head)
        is_gated(self.activation)  # refuses an unknown name
        if not callable(self.router):
            check_choice("router", self.router, ROUTERS)
        for name, choices in (
            ("qk_norm", ("heads", "all")),
            ("shared_mix", ("sigmoid", "softmax")),
        ):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), choices)
        if self.shared_mix and not self.d_shared:
            raise ValueError(f"shared_mix={self.shared_mix!r} needs a shared expert: d_shared=0")
        if not self.logits_divisor:
            raise ValueError("logits_divisor=0 must not be 0")
        if not self.windows or any(w is not None and w < 1 for w in self.windows):
            raise ValueError(f"windows={self.windows} must be numbers of at least 1, or None")
        self._check_experts()

    def _check_experts(self) -> None:
        numbers = self.n_experts if isinstance(self.n_experts, tuple) else (self.n_experts,)
        if min(numbers, default=0) < 0 or self.d_shared < 0:
            raise ValueError(
                f"n_experts={self.n_experts} and d_shared={self.d_shared} must be 0 or more"
            )
        if isinstance(self.n_experts, tuple):
            if len(numbers) != self.n_layers:
                raise ValueError(f"n_experts={numbers} must have n_layers={self.n_layers} entries")
            if self.every != 1:
                raise ValueError(f"every={self.every} is no use: n_experts={numbers} says it all")
        elif self.every > self.n_layers and self.n_experts:
            raise ValueError(
                f"every={self.every} is more than n_layers={self.n_layers}: no block would be MoE"
            )

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_features(self) -> int:
        """Features of a head."""
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def has_experts(self) -> bool:
        """Whether any block is MoE."""
        return any(self.is_moe(layer) for layer in range(self.n_layers))

    def experts_of(self, layer: int) -> int:
        """Experts of block number `layer`, counted from 0; 0 if it is dense."""
        if isinstance(self.n_experts, tuple):
            return self.n_experts[layer]
        return self.n_experts if (layer + 1) % self.every == 0 else 0

    def is_moe(self, layer: int) -> bool:
        """Whether block number `layer`, counted from 0, has experts."""
        return self.experts_of(layer) > 0

    @property
    def dense_features(self) -> int:
        """Hidden features of a dense block."""
        return (self.d_dense or self.k * self.d_ff) if self.has_experts else self.d_ff

    def window_of(self, layer: int) -> int | None:
        """Tokens that a query sees in block number `layer`; None: all before it."""
        return self.windows[layer % len(self.windows)]
