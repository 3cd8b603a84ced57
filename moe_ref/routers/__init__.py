"""Routers: hidden states in, a `Routing` out. One class for each published rule.

All compute in float32 at least, give ties to the lower index, and draw random numbers only in
training, from torch's own generator.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .._validate import check_choice
from ..routing import Routing
from .expert_choice import ExpertChoiceRouter
from .hashed import HashRouter
from .learned import LearnedRouter, router_logits
from .token_choice import (
    GShardRouter,
    NoisyTopKRouter,
    SwitchRouter,
    TopKRouter,
    check_groups,
)

__all__ = [
    "ROUTERS",
    "ExpertChoiceRouter",
    "GShardRouter",
    "HashRouter",
    "LearnedRouter",
    "NoisyTopKRouter",
    "Router",
    "SwitchRouter",
    "TopKRouter",
    "check_groups",
    "check_router",
    "make_router",
    "router_logits",
]


@runtime_checkable
class Router(Protocol):
    """What a router owes: it is an `nn.Module` with two attributes and one call.

    The call returns the `Routing` of the tokens, which `routing.decide` makes; its weights need a
    gradient if the router is to learn. `TransformerConfig(router=LargestFeature)` puts the router
    below in a `Transformer`, which hands its constructor those of d_model, n_experts, k and
    vocab_size that it takes.

    Attributes:
        n_experts: how many experts it chooses from.
        causal: whether a token's experts depend on no later token; if not, generation refuses it.
        d_model: optional; if it is there, it has to be that of the experts.

    Example:
        >>> from moe_ref.routing import decide
        >>> class LargestFeature(torch.nn.Module):  # feature i calls for expert i
        ...     causal = True
        ...
        ...     def __init__(self, n_experts):
        ...         super().__init__()
        ...         self.n_experts = n_experts
        ...
        ...     def forward(self, x, *, mask=None, token_ids=None):
        ...         logits = x[:, : self.n_experts].float()
        ...         scores = logits.softmax(dim=-1)
        ...         weights, experts = scores.max(dim=-1, keepdim=True)
        ...         return decide(experts, weights, logits, scores, mask)
        >>> layer = MoELayer(LargestFeature(3), Experts(3, d_model=4, d_ff=8))
        >>> y, routing = layer(torch.eye(4)[:3])
        >>> routing.experts[:, 0].tolist()
        [0, 1, 2]
    """

    n_experts: int
    causal: bool

    def __call__(
        self,
        x: Float[Tensor, "tokens d_model"],
        *,
        mask: Bool[Tensor, " tokens"] | None = None,
        token_ids: Int[Tensor, " tokens"] | None = None,
    ) -> Routing:
        """Route each token: `mask` is False at padding, `token_ids` are the ids of the tokens."""
        ...


ROUTERS: Mapping[str, Callable[..., Any]] = {
    "top_k": TopKRouter,
    "noisy_top_k": NoisyTopKRouter,
    "switch": SwitchRouter,
    "gshard": GShardRouter,
    "hash": HashRouter,
    "expert_choice": ExpertChoiceRouter,
}


def make_router(router: str | Callable[..., Any], options: Mapping[str, Any], **sizes: int) -> Any:
    """Make a router for a model of these sizes.

    Args:
        router: a name in `ROUTERS`, or a class of your own.
        options: keyword arguments of its constructor.
        sizes: further ones, of which the constructor gets those that it takes.

    Raises:
        ValueError: if the name is unknown, or an option is one that the constructor does not take.

    Example:
        >>> make_router("switch", {"jitter": 0.1}, d_model=8, n_experts=4, k=1, vocab_size=50)
        SwitchRouter(d_model=8, n_experts=4, k=1, jitter=0.1)
    """
    if isinstance(router, str):
        check_choice("router", router, ROUTERS)
        router = ROUTERS[router]
    takes = inspect.signature(router).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        for name in options:
            check_choice("router_options", name, takes)
    return router(**{name: size for name, size in sizes.items() if name in takes} | dict(options))


def check_router(router: object) -> None:
    """Raise a ValueError that says what `router` lacks to be a `Router`."""
    if inspect.isclass(router):
        raise ValueError(f"router={router.__name__} is a class: give one made from it")
    hint = "moe_ref.routers.Router says what a router owes"
    if not isinstance(router, nn.Module):
        raise ValueError(f"router={router!r} is no nn.Module; {hint}")
    for name in ("n_experts", "causal"):
        if not hasattr(router, name):
            raise ValueError(f"{type(router).__name__} has no attribute {name!r}; {hint}")
