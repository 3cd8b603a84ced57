"""The Mixture-of-Experts layer: route, dispatch, compute, combine."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ._validate import check_choice, check_sizes
from .dispatch import Dispatch, sorted_rows
from .routers import Router, check_router
from .routing import Routing


class MoELayer(nn.Module):
    """Takes the place of a feed-forward block: every token visits only the experts it is sent to.

    y = sum over a token's slots of weight * expert(x), plus shared(x) if there is one; with a `mix`
    the two parts have factors of their own.

    | torch's transform | works for | fails for |
    |---|---|---|
    | `func.grad`, the meta device | every backend | |
    | `func.jvp` | loop, padded | grouped: torch's grouped_mm has no forward mode |
    | `compile` | every backend | |
    | `compile`, full graph | grouped in bfloat16 | others: reading the counts breaks it |
    | `export` | every backend, in a `TensorOnly` | a capacity rule, expert choice |
    | `vmap` | | every backend: the number of rows of an expert differs between samples |

    Args:
        router: hidden states in, a `Routing` out; for instance a `TopKRouter`.
        experts: the stacked blocks, such as `Experts`.
        capacity: a rule that edits the routing, such as a `Capacity`; None: no expert is ever full.
        shared: a block that every token visits, whatever the router decides; None: there is none.
        mix: a learned factor for the routed part and one for the shared part, such as a `Mix`;
            None: both are 1.
        dispatch: how tokens get to their experts: one of the functions of `moe_ref.dispatch`.

    Raises:
        ValueError: if the parts don't fit each other; in the call, if the input doesn't fit them.

    Example:
        >>> layer = MoELayer(TopKRouter(d_model=4, n_experts=8, k=2), Experts(8, d_model=4, d_ff=6))
        >>> y, routing = layer(torch.randn(2, 5, 4))
        >>> y.shape, routing.experts.shape
        (torch.Size([2, 5, 4]), torch.Size([10, 2]))

    Source: Shazeer et al. 2017 (1701.06538), equation 1; shared experts: DeepSeekMoE 2401.06066.
    """

    def __init__(
        self,
        router: Router,
        experts: nn.Module,
        *,
        capacity: Callable[[Routing], Routing] | None = None,
        shared: nn.Module | None = None,
        mix: nn.Module | None = None,
        dispatch: Dispatch = sorted_rows,
    ) -> None:
        super().__init__()
        check_router(router)
        check_parts(router, experts, capacity, shared, mix, dispatch)
        self.router: Any = router
        self.experts: Any = experts
        self.capacity = capacity
        self.shared = shared
        self.mix = mix
        self.dispatch = dispatch

    def forward(
        self,
        x: Float[Tensor, "*batch d_model"],
        *,
        mask: Bool[Tensor, "*batch"] | None = None,
        token_ids: Int[Tensor, "*batch"] | None = None,
    ) -> tuple[Float[Tensor, "*batch d_model"], Routing]:
        """The output, and the decision that led to it.

        Args:
            x: hidden states; the axes before the last are taken together as tokens.
            mask: False at padding, which is not routed and gets 0; None: there is none.
            token_ids: ids of the tokens, for a router that needs them, such as a `HashRouter`.
        """
        self._check(x, mask)
        tokens = x.reshape(-1, x.shape[-1])
        flat_mask = None if mask is None else mask.reshape(-1)
        flat_ids = None if token_ids is None else token_ids.reshape(-1)
        routing = self.router(tokens, mask=flat_mask, token_ids=flat_ids)
        if self.capacity is not None:
            routing = self.capacity(routing)
        y = self.dispatch(tokens, routing, self.experts)
        if self.shared is not None:
            y = self._join(y, tokens, flat_mask, self.shared)
        return y.reshape(x.shape), routing

    def _join(
        self, routed: Tensor, tokens: Tensor, mask: Tensor | None, block: nn.Module
    ) -> Tensor:
        """The routed part, and what a block makes of all tokens."""
        if mask is not None:  # padding may hold NaN
            tokens = tokens.masked_fill(~mask[:, None], 0)
        shared = block(tokens)
        if mask is not None:
            shared = shared.masked_fill(~mask[:, None], 0)
        if self.mix is None:
            return routed + shared
        routed_factor, shared_factor = self.mix(tokens)
        return routed_factor * routed + shared_factor * shared

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if x.shape[-1] != self.experts.d_model:
            raise ValueError(f"x has {x.shape[-1]} features, not d_model={self.experts.d_model}")
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, but x has tokens {tuple(x.shape[:-1])}"
            )

    def extra_repr(self) -> str:
        name = getattr(self.dispatch, "__name__", type(self.dispatch).__name__)
        rule = "" if self.capacity is None else f"capacity={self.capacity!r}, "
        return f"{rule}dispatch={name}"


class Mix(nn.Module):
    """How much of the routed part and of the shared part goes into a token's output.

    | kind | factor of the routed part | factor of the shared part |
    |---|---|---|
    | sigmoid | 1 | sigmoid(w x) |
    | softmax | first share of softmax(W x + b) | second share |

    Args:
        d_model: features of a token.
        kind: a name in the table above.

    Raises:
        ValueError: if the kind is unknown or the size below 1.

    Example:
        >>> routed, shared = Mix(d_model=4, kind="softmax")(torch.randn(3, 4))
        >>> torch.allclose(routed + shared, torch.ones(3, 1))
        True

    Source: sigmoid: Qwen2-MoE, Yang et al. 2024 (2407.10671); softmax: the residual MoE of
    DeepSpeed-MoE, Rajbhandari et al. 2022 (2201.05596), section 4.1, as its code has it.
    """

    bias: Tensor | None

    def __init__(self, d_model: int, kind: str) -> None:
        super().__init__()
        check_choice("kind", kind, ("sigmoid", "softmax"))
        check_sizes(d_model=d_model)
        self.d_model, self.kind = d_model, kind
        outputs = 1 if kind == "sigmoid" else 2
        bias = torch.zeros(outputs) if kind == "softmax" else None
        self.weight = nn.Parameter(torch.empty(outputs, d_model))
        nn.init.uniform_(self.weight, -(d_model**-0.5), d_model**-0.5)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def forward(
        self, x: Float[Tensor, "tokens d_model"]
    ) -> tuple[Float[Tensor, "tokens 1"] | float, Float[Tensor, "tokens 1"]]:
        """The two factors of each token."""
        logits = F.linear(x, self.weight, self.bias)
        if self.kind == "sigmoid":
            return 1.0, logits.sigmoid()
        routed, shared = logits.softmax(dim=-1).chunk(2, dim=-1)
        return routed, shared

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, kind={self.kind}"


class TensorOnly(nn.Module):
    """A `MoELayer` for a model that expects a tensor from its feed-forward block.

    It returns y alone and hands the routing to a callback, which may keep it for a balance loss.
    Activation checkpointing computes the layer again, and so calls the callback again.

    Args:
        layer: the layer.
        on_routing: called with the `Routing` of each forward; None: the routing is dropped.

    Example:
        >>> layer = MoELayer(TopKRouter(d_model=4, n_experts=8, k=2), Experts(8, d_model=4, d_ff=6))
        >>> routings = []
        >>> model = nn.Sequential(nn.Linear(3, 4), TensorOnly(layer, routings.append))
        >>> model(torch.randn(5, 3)).shape, len(routings)
        (torch.Size([5, 4]), 1)
    """

    def __init__(
        self, layer: MoELayer, on_routing: Callable[[Routing], object] | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.on_routing = on_routing

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        y, routing = self.layer(x)
        if self.on_routing is not None:
            self.on_routing(routing)
        return y


def check_parts(
    router: object,
    experts: object,
    capacity: object,
    shared: object,
    mix: object,
    dispatch: object,
) -> None:
    """Raise a ValueError that names the first part that does not fit the experts."""
    if not hasattr(experts, "n_experts") or not hasattr(experts, "d_model"):
        raise ValueError(f"experts={experts!r} is no Experts(n_experts, d_model, d_ff)")
    for name, part in (("router", router), ("shared", shared), ("mix", mix)):
        for size in ("n_experts", "d_model"):
            theirs, ours = getattr(part, size, None), getattr(experts, size)
            if theirs is not None and theirs != ours:
                raise ValueError(f"{name} has {size}={theirs}, but experts have {size}={ours}")
    if capacity is not None and not callable(capacity):
        raise ValueError(f"capacity={capacity!r} is no rule: make it Capacity({capacity!r})")
    if shared is not None and not callable(shared):
        raise ValueError(f"shared={shared!r} is no module, such as FeedForward(d_model, d_ff)")
    if mix is not None and shared is None:
        raise ValueError(f"mix={mix!r} needs a shared block to mix with the experts")
    if not callable(dispatch):
        raise ValueError(f"dispatch={dispatch!r} is no function (x, routing, experts) -> y")
