"""A decoder whose blocks are dense or Mixture-of-Experts, and its key-value cache.

    tokens -> embedding -> [ x + attention(norm(x)) -> x + mlp(norm(x)) ] * n_layers -> norm -> head

The mathematics is Mixtral's (2401.04088): RMSNorm before each part, rotary positions,
grouped-query attention, SwiGLU. `mlp` is a `FeedForward` or a `MoELayer`.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .capacity import Capacity
from .experts import Experts
from .ffn import FeedForward, check_sizes
from .layer import MoELayer
from .routers import (
    ExpertChoiceRouter,
    GShardRouter,
    HashRouter,
    NoisyTopKRouter,
    SwitchRouter,
    TopKRouter,
)
from .routing import Routing

ROUTERS = ("top_k", "noisy_top_k", "switch", "gshard", "hash", "expert_choice")


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a `Transformer`. With n_experts = 0 every block is dense.

    Args:
        vocab_size, d_model, n_layers, n_heads: as everywhere.
        d_ff: hidden features of a dense block, and of each expert.
        n_kv_heads: heads of keys and values, each shared by n_heads / n_kv_heads heads of queries;
            None: as many as n_heads.
        n_experts, k: experts of a MoE block, and how many serve a token.
        every: every n-th block is MoE, the last of each n; 1: all.
        d_dense: hidden features of the dense blocks among MoE blocks; None: k * d_ff, which costs
            the same FLOPs.
        d_shared: hidden features of a block beside the experts that every token visits; 0: none.
        router: one of `ROUTERS`; `router_options` are its keyword arguments.
        capacity: factor of `Capacity`; infinity drops nothing. `capacity_options` are the others.
        tied: whether the head is the embedding.
        rope_theta: base of the rotary angles.
        norm_eps: added to the mean square in RMSNorm.
        backend: of the `Experts`.

    Raises:
        ValueError: if a size is impossible or a name unknown.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    n_kv_heads: int | None = None
    n_experts: int = 0
    k: int = 2
    every: int = 1
    d_dense: int | None = None
    d_shared: int = 0
    router: str = "top_k"
    router_options: Mapping[str, Any] = field(default_factory=dict)
    capacity: float = math.inf
    capacity_options: Mapping[str, Any] = field(default_factory=dict)
    tied: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_sizes(vocab_size=self.vocab_size, d_model=self.d_model, n_layers=self.n_layers)
        check_sizes(n_heads=self.n_heads, d_ff=self.d_ff, every=self.every, k=self.k)
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"n_heads={self.n_heads} does not divide d_model={self.d_model} into heads of an"
                " even number of features"
            )
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}")
        if self.router not in ROUTERS:
            raise ValueError(f"router={self.router!r} is none of {', '.join(ROUTERS)}")
        if self.n_experts < 0 or self.d_shared < 0:
            raise ValueError(
                f"n_experts={self.n_experts} and d_shared={self.d_shared} must be 0 or more"
            )
        if self.every > self.n_layers and self.n_experts:
            raise ValueError(
                f"every={self.every} is more than n_layers={self.n_layers}: no block would be MoE"
            )

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_features(self) -> int:
        return self.d_model // self.n_heads

    def is_moe(self, layer: int) -> bool:
        """Whether block number `layer`, counted from 0, has experts."""
        return self.n_experts > 0 and (layer + 1) % self.every == 0


@dataclass(frozen=True, eq=False)
class Output:
    """What a `Transformer` says, and the decisions that led to it, one for each MoE block."""

    logits: Float[Tensor, "batch seq vocab"]
    routings: tuple[Routing, ...]


class Cache:
    """Keys and values of the tokens read so far, for each block; room for `length` tokens.

    Raises ValueError when more tokens come than there is room for.
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch: int,
        length: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_sizes(batch=batch, length=length)
        shape = (config.n_layers, batch, config.kv_heads, length, config.head_features)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.length = length
        self.seen = 0  # tokens of each sequence that all blocks have read

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens to a block's; return all of them."""
        end = self.seen + keys.shape[2]
        if end > self.length:
            raise ValueError(f"the cache has room for length={self.length} tokens, not {end}")
        self.keys[layer, :, :, self.seen : end] = keys
        self.values[layer, :, :, self.seen : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Transformer(nn.Module):
    """The decoder: logits of the next token at every position.

    Raises:
        ValueError: if tokens lie outside the vocabulary, or the cache has no room.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        mask: Bool[Tensor, "batch seq"] | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Read tokens, after those in the cache if one is given.

        Args:
            tokens: ids, 0 to vocab_size - 1.
            mask: False at padding, which follows a sequence and is not routed.
            cache: holds the tokens before these, and takes these in.
        """
        if not tokens.is_cuda and tokens.numel():  # a GPU would have to wait for the answer
            self._check(tokens)
        x = self.embedding(tokens)
        start = 0 if cache is None else cache.seen
        angles = rotary_angles(start, tokens.shape[1], self.config, x.device)
        routings = []
        for block in self.blocks:
            x, routing = block(x, angles, tokens, mask, cache)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.seen += tokens.shape[1]
        return Output(self.head(self.norm(x)), tuple(routings))

    def _check(self, tokens: Tensor) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token {wrong} is not one of vocab_size={self.config.vocab_size}")


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = make_mlp(config, layer)

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        angles: Float[Tensor, "seq half"],
        tokens: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"] | None,
        cache: Cache | None,
    ) -> tuple[Float[Tensor, "batch seq d_model"], Routing | None]:
        x = x + self.attention(self.attention_norm(x), angles, cache, self.layer)
        hidden = self.mlp_norm(x)
        if isinstance(self.mlp, FeedForward):
            return x + self.mlp(hidden), None
        y, routing = self.mlp(hidden, mask=mask, token_ids=tokens)
        return x + y, routing


class Attention(nn.Module):
    """Causal attention; each head of keys and values serves n_heads / n_kv_heads of queries.

    Source: Vaswani et al. 2017; grouped queries: Ainslie et al. 2023 (2305.13245).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.n_heads, config.kv_heads
        wide, narrow = config.d_model, config.kv_heads * config.head_features
        self.query = nn.Linear(config.d_model, wide, bias=False)
        self.key = nn.Linear(config.d_model, narrow, bias=False)
        self.value = nn.Linear(config.d_model, narrow, bias=False)
        self.out = nn.Linear(wide, config.d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        angles: Float[Tensor, "seq half"],
        cache: Cache | None,
        layer: int,
    ) -> Float[Tensor, "batch seq d_model"]:
        split = "batch seq (heads features) -> batch heads seq features"
        q = rotate(rearrange(self.query(x), split, heads=self.heads), angles)
        k = rotate(rearrange(self.key(x), split, heads=self.kv_heads), angles)
        v = rearrange(self.value(x), split, heads=self.kv_heads)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        y = attend(q, k, v)
        return self.out(rearrange(y, "batch heads seq features -> batch seq (heads features)"))


def attend(
    q: Float[Tensor, "batch heads seq features"],
    k: Float[Tensor, "batch kv_heads past_and_seq features"],
    v: Float[Tensor, "batch kv_heads past_and_seq features"],
) -> Float[Tensor, "batch heads seq features"]:
    """Each query sees the keys up to its own; the last query stands beside the last key."""
    seq, total = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if seq == total:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    seen = torch.ones(seq, total, dtype=torch.bool, device=q.device).tril(total - seq)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)


def rotary_angles(
    start: int, seq: int, config: TransformerConfig, device: torch.device
) -> Float[Tensor, "seq half"]:
    """position * theta^(-2i / features), float32. Source: RoFormer, Su et al. 2021 (2104.09864)."""
    features = config.head_features
    exponents = torch.arange(0, features, 2, device=device, dtype=torch.float32) / features
    positions = torch.arange(start, start + seq, device=device, dtype=torch.float32)
    return positions[:, None] * config.rope_theta**-exponents


def rotate(
    x: Float[Tensor, "batch heads seq features"], angles: Float[Tensor, "seq half"]
) -> Float[Tensor, "batch heads seq features"]:
    """Turn feature i and feature i + half, as a pair, by angle i of the position."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def make_mlp(config: TransformerConfig, layer: int) -> FeedForward | MoELayer:
    """The feed-forward part of block number `layer`."""
    if not config.n_experts:
        return FeedForward(config.d_model, config.d_ff)
    if not config.is_moe(layer):
        return FeedForward(config.d_model, config.d_dense or config.k * config.d_ff)
    limited = not math.isinf(config.capacity)
    return MoELayer(
        make_router(config),
        Experts(config.n_experts, config.d_model, config.d_ff, backend=config.backend),
        capacity=Capacity(config.capacity, **config.capacity_options) if limited else None,
        shared=FeedForward(config.d_model, config.d_shared) if config.d_shared else None,
    )


def make_router(config: TransformerConfig) -> nn.Module:
    """The router that a configuration names."""
    sizes, options = (config.d_model, config.n_experts), config.router_options
    if config.router == "switch":
        return SwitchRouter(*sizes, **options)
    if config.router == "gshard":
        return GShardRouter(*sizes, **options)
    if config.router == "hash":
        return HashRouter(config.n_experts, config.vocab_size, **options)
    chosen = {
        "top_k": TopKRouter,
        "noisy_top_k": NoisyTopKRouter,
        "expert_choice": ExpertChoiceRouter,
    }[config.router]
    return chosen(*sizes, config.k, **options)


def upcycle(dense: Transformer, n_experts: int, *, k: int = 2, every: int = 1) -> Transformer:
    """A MoE whose experts all begin as the dense model's block: the same function, to train on.

    The weights of a token's k experts sum to 1, so that k equal answers give the one answer; the
    router begins at random. Costs k times the FLOPs of the dense block.

    Raises ValueError if the model has experts already, or the sizes don't fit.
    Source: Komatsuzaki et al. 2022 (2212.05055).
    """
    if dense.config.n_experts:
        raise ValueError(f"the model has n_experts={dense.config.n_experts} already")
    config = dataclasses.replace(
        dense.config, n_experts=n_experts, k=k, every=every, d_dense=dense.config.d_ff
    )
    model = Transformer(config)
    copied = model.state_dict()
    for name, tensor in dense.state_dict().items():
        stacked = name.replace("mlp.", "mlp.experts.").removesuffix(".weight")
        if name in copied:
            copied[name].copy_(tensor)
        else:
            copied[stacked].copy_(tensor.expand_as(copied[stacked]))
    parameter = dense.embedding.weight
    return model.to(parameter.device, parameter.dtype)
