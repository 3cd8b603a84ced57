"""What a model is made of, and what follows by counting: parameters, FLOPs, bytes.

parts(config) -> Part, Part, ...   # everything else is a sum over these
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .._validate import check_choice, check_sizes
from ..ffn import is_gated
from ..routers import make_router

# Bytes of a number. What is not a weight (activations, cache) has 16 bits at least.
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1, "float4": 0.5}
LAYOUTS = ("experts", "tensor")  # how machines share a model: see `time`


@dataclass(frozen=True)
class Part:
    """A part of a model, as often as it occurs with these sizes.

    Args:
        name: "embedding", "norm", "attention", "dense", "shared", "mix", "router", "experts",
            "head"; other names count too, but no machine knows their overhead.
        weights: parameters of one copy in one place.
        places: layers that have it; a layer with other sizes has a part of its own.
        n_experts: copies side by side.
        k: copies that one token visits; a mean in expert choice.
        flops: of the products of a token with one copy; None: 2 * weights.
        read: weights that a pass reads in one copy; None: all. An embedding reads next to none, a
            tied head reads the embedding's.
        cached: numbers kept for each token in one place, its keys and values.
        mixing: FLOPs for each token and each key that it sees, in one place.
        window: keys that a token sees at most; None: all before it, and its own.
        width: features of its rows, which travel where it is split over machines.

    Raises:
        ValueError: if a count is below 0, or k is not from 1 to n_experts.

    Example:
        >>> experts = Part("experts", weights=3 * 2048 * 768, places=48, n_experts=128, k=8)
        >>> parameters([experts]).active / parameters([experts]).total
        0.0625
    """

    name: str
    weights: int
    places: int = 1
    n_experts: int = 1
    k: float = 1
    flops: int | None = None
    read: int | None = None
    cached: int = 0
    mixing: int = 0
    window: int | None = None
    width: int = 0

    def __post_init__(self) -> None:
        for name in ("weights", "flops", "read", "cached", "mixing", "width"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} of {self.name!r} is below 0")
        check_sizes(places=self.places, n_experts=self.n_experts)
        if not 0 < self.k <= self.n_experts:
            raise ValueError(
                f"k={self.k} of {self.name!r} is not from 1 to n_experts={self.n_experts}"
            )

    @property
    def products(self) -> int:
        """FLOPs of a token in one copy."""
        return 2 * self.weights if self.flops is None else self.flops

    @property
    def numbers(self) -> float:
        """Numbers of a token that come out of the products of one copy, or go through it."""
        return self.width + (self.products / (2 * self.width) if self.width else 0)

    @property
    def reads(self) -> int:
        """Weights that a pass reads in one copy."""
        return self.weights if self.read is None else self.read


def parts(model: Any) -> tuple[Part, ...]:
    """What a model is made of.

    Args:
        model: a `TransformerConfig`; or anything with a method `parts`, such as a model of
            `moe_ref.catalog`; or parts themselves.

    Raises:
        ValueError: if it is none of these.

    Example:
        >>> config = TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48, n_experts=8)
        >>> [(part.name, part.places) for part in parts(config)][:3]
        [('embedding', 1), ('attention', 2), ('norm', 5)]
    """
    if hasattr(model, "parts"):
        return tuple(model.parts())
    if isinstance(model, Iterable):
        found = tuple(model)
        if found and all(isinstance(part, Part) for part in found):
            return found
    if not hasattr(model, "d_model"):
        raise ValueError(f"model={model!r} is no TransformerConfig and has no parts()")
    c = model
    embedding = Part("embedding", c.vocab_size * c.d_model, flops=0, read=0, width=c.d_model)
    norm = Part("norm", c.d_model, flops=0, width=c.d_model)
    layers: Counter[Part] = Counter()
    for layer in range(c.n_layers):
        layers.update([_attention(c, layer), norm, norm, *_feed_forward(c, layer)])
    layers.update([norm])
    inside = [replace(part, places=places) for part, places in layers.items()]
    matrix = c.vocab_size * c.d_model
    head = Part("head", 0 if c.tied else matrix, flops=2 * matrix, read=matrix, width=c.d_model)
    return (embedding, *inside, head)


def _attention(c: Any, layer: int) -> Part:
    queries, keys = c.n_heads * c.head_features, c.kv_heads * c.head_features
    matrices = c.d_model * (queries + 2 * keys) + queries * c.d_model
    norms = {None: 0, "heads": 2 * c.head_features, "all": queries + keys}[c.qk_norm]
    biases = (queries + 2 * keys) * c.qkv_bias + c.d_model * c.out_bias
    return Part(
        "attention",
        matrices + norms + biases + c.n_heads * c.sinks,
        flops=2 * matrices,
        cached=2 * keys,
        mixing=4 * queries,  # a product with the key, one with the value
        window=c.window_of(layer),
        width=c.d_model,
    )


def _feed_forward(c: Any, layer: int) -> list[Part]:
    n_experts = c.experts_of(layer)
    if not n_experts:
        return [_block(c, "dense", c.dense_features)]
    sizes = {"d_model": c.d_model, "n_experts": n_experts, "k": c.k, "vocab_size": c.vocab_size}
    with torch.device("meta"):  # whatever the router: its own parameters are counted
        router = make_router(c.router, c.router_options, **sizes)
    weights = [parameter for parameter in router.parameters() if parameter.ndim > 1]
    found = [
        Part(
            "router",
            sum(parameter.numel() for parameter in router.parameters()),
            flops=2 * sum(weight.numel() for weight in weights),
            width=c.d_model,
        ),
        replace(_block(c, "experts", c.d_ff), n_experts=n_experts, k=getattr(router, "k", c.k)),
    ]
    if c.d_shared:
        found.append(_block(c, "shared", c.d_shared))
        if c.shared_mix:
            ways, bias = (1, 0) if c.shared_mix == "sigmoid" else (2, 2)
            flops = 2 * ways * c.d_model
            found.append(Part("mix", ways * c.d_model + bias, flops=flops, width=c.d_model))
    return found


def _block(c: Any, name: str, hidden: int) -> Part:
    """One feed-forward block of this many hidden features."""
    inputs = 2 * hidden if is_gated(c.activation) else hidden
    matrices = c.d_model * (inputs + hidden)
    weights = matrices + (inputs + c.d_model) * c.bias
    return Part(name, weights, flops=2 * matrices, width=c.d_model)


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model.

    Attributes:
        total: all of them.
        active: those that one token uses, the embedding among them.
        active_without_embeddings: the same without the input embedding. Published figures follow
            either convention. A tied matrix is the head's, and counts in both.

    Example:
        >>> parameters(TransformerConfig(100, 32, 2, n_heads=4, d_ff=48, n_experts=8))
        Parameters(total=88992, active=33696, active_without_embeddings=30496)
    """

    total: int
    active: int
    active_without_embeddings: int


def parameters(model: Any) -> Parameters:
    """Count the parameters of a model.

    Args:
        model: as in `parts`.

    Example:
        >>> moe = TransformerConfig(32_000, 4096, 32, 32, 14_336, n_kv_heads=8, n_experts=8, k=2)
        >>> counted = parameters(moe)  # Mixtral 8x7B
        >>> f"{counted.total / 1e9:.2f}B, {counted.active / 1e9:.2f}B active"
        '46.70B, 12.88B active'
    """
    found = parts(model)
    active = round(sum(part.weights * part.places * part.k for part in found))
    tied = any(part.name == "head" and not part.weights for part in found)
    looked_up = sum(p.weights * p.places for p in found if p.name == "embedding" and not tied)
    total = sum(part.weights * part.places * part.n_experts for part in found)
    return Parameters(total, active, active - looked_up)


def keys_seen(tokens: int, context: int = 0, window: int | None = None) -> int:
    """Keys that `tokens` new tokens after `context` earlier ones see, added up.

    Example:
        >>> keys_seen(3), keys_seen(1, context=9), keys_seen(3, context=9, window=4)
        (6, 10, 12)
    """
    growing = tokens if window is None else max(0, min(tokens, window - context))
    return growing * context + growing * (growing + 1) // 2 + (tokens - growing) * (window or 0)


def flops(
    model: Any, tokens: int = 1, *, batch: float = 1, context: int = 0, backward: bool = False
) -> int:
    """FLOPs of the matrix products of one pass; a multiplication and an addition are two.

    Norms, activations, the softmax and other small things don't count. Of attention the keys that
    a token sees count, not those that a mask hides.

    Args:
        model: as in `parts`.
        tokens: new tokens of each sequence: a prompt's length in prefill, 1 in decode.
        batch: sequences.
        context: tokens of each sequence that were read before.
        backward: whether the backward pass counts too, which is twice the forward: gradients of
            the inputs and of the weights.

    Raises:
        ValueError: if a number is impossible.

    Example:
        >>> config = TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48)
        >>> flops(config, context=1000) - flops(config)  # 2 layers * 4 * 32 for each key
        256000
    """
    check_pass(batch, tokens, context)
    total = 0.0
    for part in parts(model):
        mixing = part.mixing * keys_seen(tokens, context, part.window)
        total += part.places * (part.k * part.products * tokens + mixing)
    return round(total * batch * (3 if backward else 1))


@dataclass(frozen=True)
class Memory:
    """Bytes that a model takes.

    Attributes:
        weights: of all parameters.
        cache: of the keys and values of all sequences.

    Example:
        >>> Memory(weights=14e9, cache=2e9).total
        16000000000.0
    """

    weights: float
    cache: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.weights + self.cache


def memory(
    model: Any,
    *,
    batch: float = 1,
    context: int = 0,
    dtype: str = "bfloat16",
    machines: int = 1,
    layout: str = "experts",
) -> Memory:
    """Bytes that each machine holds: weights, and the keys and values of its sequences.

    Args:
        model: as in `parts`.
        batch: sequences, on all machines together.
        context: tokens of each.
        dtype: of the weights, a key of `BYTES`; the cache has 16 bits at least.
        machines, layout: how many share the model, and how: as in `time`.

    Raises:
        ValueError: if a number is impossible or a name unknown.

    Example:
        >>> moe = TransformerConfig(32_000, 4096, 32, 32, 14_336, n_kv_heads=8, n_experts=8, k=2)
        >>> f"{memory(moe).total / 1e9:.1f} GB, {memory(moe, machines=8).total / 1e9:.1f} GB"
        '93.4 GB, 14.5 GB'
    """
    check_pass(batch, 1, context)
    check_choice("dtype", dtype, BYTES)
    check_layout(layout, machines)
    weights = cached = 0.0
    for part in parts(model):
        split = machines if layout == "tensor" or part.n_experts > 1 else 1
        weights += part.places * part.n_experts * part.weights / split
        seen = context if part.window is None else min(context, part.window)
        cached += part.places * part.cached * seen * batch / machines
    return Memory(weights * BYTES[dtype], cached * max(BYTES[dtype], BYTES["bfloat16"]))


def check_pass(batch: float, tokens: int, context: int) -> None:
    """Raise a ValueError unless batch and tokens are more than 0 and the context is not below."""
    check_sizes(tokens=tokens)
    if not batch > 0 or math.isinf(batch):
        raise ValueError(f"batch={batch} must be more than 0")
    if context < 0:
        raise ValueError(f"context={context} must be 0 or more")


def check_layout(layout: str, machines: int) -> None:
    """Raise a ValueError unless the layout is known and there is a machine."""
    check_choice("layout", layout, LAYOUTS)
    check_sizes(machines=machines)
