"""A decoder whose blocks are dense or Mixture-of-Experts.

    tokens -> embedding -> [ x + attention(norm(x)) -> x + mlp(norm(x)) ] * n_layers -> norm -> head

RMSNorm before each part, rotary positions, grouped-query attention; with the usual options it is
Mixtral's mathematics (2401.04088). `mlp` is a `FeedForward` or a `MoELayer`.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .attention import Attention, Step, prepare
from .capacity import Capacity
from .config import TransformerConfig
from .experts import Experts
from .ffn import FeedForward
from .kernels.cpu import Linear
from .kv_cache import KVCache
from .layer import Mix, MoELayer
from .routers import make_router
from .routing import Routing


@dataclass(frozen=True, eq=False)
class Output:
    """What a `Transformer` returns.

    Attributes:
        logits: of the next token, at every position.
        routings: the decision of each MoE block, in order.

    Example:
        >>> Output(torch.zeros(1, 3, 50), routings=())
        Output(logits=[1, 3, 50], routings=0)
    """

    logits: Float[Tensor, "batch seq vocab"]
    routings: tuple[Routing, ...]

    def __repr__(self) -> str:
        return f"Output(logits={list(self.logits.shape)}, routings={len(self.routings)})"


class Transformer(nn.Module):
    """A decoder: token ids in, logits of the next token out, at every position.

    Args:
        config: its shape.

    Example:
        >>> config = TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48, n_experts=8)
        >>> Transformer(config)(torch.tensor([[3, 1, 4, 1, 5]]))
        Output(logits=[1, 5, 100], routings=2)

    Source: Mixtral, Jiang et al. 2024 (2401.04088).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight

    def extra_repr(self) -> str:
        kind = f"n_experts={self.config.n_experts}" if self.config.has_experts else "dense"
        return f"{kind}, tied={self.config.tied}"

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        positions: Int[Tensor, "batch seq"] | None = None,
        mask: Bool[Tensor, "batch seq"] | None = None,
        cache: KVCache | None = None,
    ) -> Output:
        """Read tokens, after those in the cache if one is given.

        Args:
            tokens: ids, 0 to vocab_size - 1.
            positions: of each token in its sequence, from 0; a token sees those of its sequence at
                positions up to its own. None: a sequence goes on where the cache ends, or begins
                at 0. With a cache, no other positions are possible.
            mask: False at padding, before or after the tokens of a sequence: it is not routed, not
                stored and not seen, and its own logits mean nothing. None: no padding.
            cache: holds the tokens before these, and stores these too.

        Raises:
            ValueError: if tokens are not in the vocabulary, positions or mask do not fit them, or
                the cache has no room for them or was made for another model or batch.
        """
        if tokens.device.type == "cpu" and tokens.numel():  # the host would wait for a GPU
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(f"token {wrong} is not one of vocab_size={self.config.vocab_size}")
        x = scaled(self.embedding(tokens), self.config.embedding_scale)
        step = prepare(self.config, x, positions, mask, cache)
        routings = []
        for block in self.blocks:
            x, routing = block(x, step, tokens, mask)
            if routing is not None:
                routings.append(routing)
        logits, divisor = self.head(self.norm(x)), self.config.logits_divisor
        output = Output(logits if divisor == 1 else logits / divisor, tuple(routings))
        if cache is not None:
            cache.commit()
        return output


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); what is added has a factor, usually 1.

    Args:
        config: of the model.
        layer: number of the block, from 0, which decides whether `mlp` is MoE.

    Example:
        >>> config = TransformerConfig(100, 32, 2, 4, d_ff=48, n_experts=8, every=2)
        >>> [type(Block(config, layer).mlp).__name__ for layer in range(2)]
        ['FeedForward', 'MoELayer']
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        shared = ("d_head", "qk_norm", "qkv_bias", "out_bias", "sinks", "norm_eps")
        self.attention = Attention(
            config.d_model,
            config.n_heads,
            config.kv_heads,
            window=config.window_of(layer),
            scale=config.attention_scale,
            **{name: getattr(config, name) for name in shared},
        )
        self.residual_scale = config.residual_scale
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = make_mlp(config, layer)

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        step: Step,
        tokens: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"] | None,
    ) -> tuple[Float[Tensor, "batch seq d_model"], Routing | None]:
        """The new hidden states, and the routing if the block is MoE."""
        y = self.attention(self.attention_norm(x), step, self.layer)
        x = x + scaled(y, self.residual_scale)
        hidden, routing = self.mlp_norm(x), None
        if isinstance(self.mlp, FeedForward):
            y = self.mlp(hidden)
        else:
            y, routing = self.mlp(hidden, mask=mask, token_ids=tokens)
        return x + scaled(y, self.residual_scale), routing


def make_mlp(config: TransformerConfig, layer: int) -> FeedForward | MoELayer:
    """The feed-forward part of block number `layer`, counted from 0."""
    block = partial(FeedForward, config.d_model, activation=config.activation, bias=config.bias)
    n_experts = config.experts_of(layer)
    if not n_experts:
        return block(config.dense_features)
    sizes = {name: getattr(config, name) for name in ("d_model", "k", "vocab_size")}
    capacity = None
    if not math.isinf(config.capacity_factor):
        capacity = Capacity(config.capacity_factor, **config.capacity_options)
    return MoELayer(
        make_router(config.router, config.router_options, n_experts=n_experts, **sizes),
        Experts(
            n_experts,
            config.d_model,
            config.d_ff,
            activation=config.activation,
            bias=config.bias,
            backend=config.backend,
        ),
        capacity=capacity,
        shared=block(config.d_shared) if config.d_shared else None,
        mix=Mix(config.d_model, config.shared_mix) if config.shared_mix else None,
    )


def scaled(x: Tensor, factor: float) -> Tensor:
    """x times a factor that is nearly always 1."""
    return x if factor == 1 else x * factor


def upcycle(dense: Transformer, n_experts: int, *, k: int = 2, every: int = 1) -> Transformer:
    """A MoE model that computes what the dense one does, to train on from there.

    Each expert begins as a copy of the dense block, and the router at random. The weights of a
    token's k experts sum to 1, so k equal outputs add up to the output of the dense block, for k
    times its FLOPs.

    Args:
        dense: a model without experts; it stays as it is.
        n_experts, k, every: as in `TransformerConfig`.

    Returns:
        A new model, on the device and with the dtype of the dense one.

    Raises:
        ValueError: if the model has experts already, or a size is impossible.

    Example:
        >>> dense = Transformer(TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48))
        >>> moe, tokens = upcycle(dense, n_experts=8), torch.tensor([[3, 1, 4]])
        >>> torch.allclose(moe(tokens).logits, dense(tokens).logits, atol=1e-5)
        True

    Source: Komatsuzaki et al. 2022 (2212.05055).
    """
    if dense.config.has_experts:
        raise ValueError(f"the model has n_experts={dense.config.n_experts} already")
    config = dataclasses.replace(
        dense.config, n_experts=n_experts, k=k, every=every, d_dense=dense.config.d_ff
    )
    model = Transformer(config)
    copied = model.state_dict()
    for name, tensor in dense.state_dict().items():
        stacked = name.replace("mlp.", "mlp.experts.").replace(".bias", "_bias")
        stacked = stacked.removesuffix(".weight")
        if name in copied:
            copied[name].copy_(tensor)
        else:
            copied[stacked].copy_(tensor.expand_as(copied[stacked]))
    parameter = dense.embedding.weight
    return model.to(parameter.device, parameter.dtype)


@torch.no_grad()
def fold_scale(model: Transformer) -> Transformer:
    """Move the `scale` of each router into the `down` weights of its experts.

    The model computes what it did, and a format that knows no scale, such as Mixtral's, can hold
    it. Weights that sum to 1 average k independent answers, so that a new MoE block has 1/sqrt(k)
    of the output of a dense one; a scale of sqrt(k) makes up for it.

    Args:
        model: it is changed in place; routers without a scale stay as they are.

    Returns:
        The model itself.

    Example:
        >>> options = {"router_options": {"scale": 2**0.5}}
        >>> model = Transformer(TransformerConfig(9, 16, 1, 2, 24, n_experts=4, **options))
        >>> tokens = torch.tensor([[3, 1, 4]])
        >>> before, after = model(tokens).logits, fold_scale(model)(tokens).logits
        >>> torch.allclose(before, after, atol=1e-5), model.config.router_options
        (True, {})
    """
    layers = [part for part in model.modules() if isinstance(part, MoELayer)]
    for layer in layers:
        if hasattr(layer.router, "scale"):
            for weight in (layer.experts.down, layer.experts.down_bias):
                if weight is not None:
                    weight.mul_(layer.router.scale)
            layer.router.scale = 1.0
    options = {name: x for name, x in model.config.router_options.items() if name != "scale"}
    model.config = dataclasses.replace(model.config, router_options=options)
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient; afterwards each part of the model has the mode it had."""
    training = [module for module in model.modules() if module.training]
    try:
        if training:  # setting a mode is slow, and decode is here for each token
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
