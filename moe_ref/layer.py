"""The Mixture-of-Experts layer: route, dispatch, compute, combine."""

from collections.abc import Callable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from . import dispatch
from .experts import Experts
from .ffn import FeedForward
from .routing import Routing


class MoELayer(nn.Module):
    """Takes the place of a feed-forward block: every token visits only the experts it is sent to.

    y = sum over a token's slots of weight * expert(x), plus shared(x) if there is one.

    Args:
        router: hidden states in, a `Routing` out; for instance a `TopKRouter`.
        experts: the stacked blocks.
        capacity: a rule that edits the routing, such as a limit on the tokens of an expert.
        shared: a block that every token visits, whatever the router says.

    Raises:
        ValueError: if router and experts disagree on n_experts, or the input doesn't fit.

    Source: Shazeer et al. 2017 (1701.06538), equation 1; shared experts: DeepSeekMoE 2401.06066.
    """

    def __init__(
        self,
        router: nn.Module,
        experts: Experts,
        *,
        capacity: Callable[[Routing], Routing] | None = None,
        shared: FeedForward | None = None,
    ) -> None:
        super().__init__()
        if router.n_experts != experts.n_experts:
            raise ValueError(
                f"the router has n_experts={router.n_experts}, "
                f"but experts have n_experts={experts.n_experts}"
            )
        self.router = router
        self.experts = experts
        self.capacity = capacity
        self.shared = shared

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
            mask: False at padding, which is not routed and gets 0.
            token_ids: for routers that go by the token itself.
        """
        self._check(x, mask)
        tokens = x.reshape(-1, x.shape[-1])
        flat_mask = None if mask is None else mask.reshape(-1)
        flat_ids = None if token_ids is None else token_ids.reshape(-1)
        routing = self.router(tokens, mask=flat_mask, token_ids=flat_ids)
        if self.capacity is not None:
            routing = self.capacity(routing)
        plan = dispatch.plan(routing)
        rows = self.experts(dispatch.permute(tokens, plan), plan.counts)
        y = dispatch.combine(rows, plan, routing)
        if self.shared is not None:
            y = y + visit(self.shared, tokens, flat_mask)
        return y.reshape(x.shape), routing

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if x.shape[-1] != self.experts.d_model:
            raise ValueError(f"x has {x.shape[-1]} features, not d_model={self.experts.d_model}")
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, but x has tokens {tuple(x.shape[:-1])}"
            )


def visit(
    block: FeedForward,
    tokens: Float[Tensor, "tokens d_model"],
    mask: Bool[Tensor, " tokens"] | None,
) -> Float[Tensor, "tokens d_model"]:
    """Every token through one block; padding gets 0."""
    if mask is None:
        return block(tokens)
    padding = ~mask[:, None]  # cleared on the way in too: it may hold NaN
    return block(tokens.masked_fill(padding, 0)).masked_fill(padding, 0)
