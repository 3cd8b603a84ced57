"""What the learned routers share: a row of weights for each expert, and how padding is treated."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .._validate import check_sizes
from ..ffn import autocast_dtype
from ..routing import Routing


class LearnedRouter(nn.Module):
    """A router that scores experts by its `weight` [n_experts, d_model]; subclasses choose by it.

    Args:
        d_model: features of a token.
        n_experts: experts to choose from.

    Raises:
        ValueError: if a size is below 1.

    Example:
        >>> from moe_ref.routing import decide
        >>> class Softmax(LearnedRouter):  # every expert serves every token
        ...     def choose(self, x, mask):
        ...         logits = router_logits(x, self.weight)
        ...         experts = torch.arange(self.n_experts).repeat(len(x), 1)
        ...         return decide(experts, logits.softmax(-1), logits, logits.softmax(-1), mask)
        >>> Softmax(d_model=4, n_experts=2)(torch.randn(3, 4)).counts
        tensor([3, 3])
    """

    causal = True
    k: Any  # experts per token; a mean, which may be a fraction, in expert choice

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__()
        check_sizes(d_model=d_model, n_experts=n_experts)
        self.d_model, self.n_experts = d_model, n_experts
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as nn.Linear does, uniformly within 1 / sqrt(d_model) of 0."""
        bound = self.d_model**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        *,
        mask: Bool[Tensor, " tokens"] | None = None,
        token_ids: Int[Tensor, " tokens"] | None = None,
    ) -> Routing:
        """Route each token; `mask` is False at padding, and `token_ids` is ignored."""
        if mask is not None:
            x = x.masked_fill(~mask[:, None], 0)  # padding may hold anything, even NaN
        return self.choose(x, mask)

    def choose(
        self, x: Float[Tensor, "tokens d_model"], mask: Bool[Tensor, " tokens"] | None
    ) -> Routing:
        """The rule itself, for tokens whose padding has been set to 0."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to choose")

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, n_experts={self.n_experts}, k={self.k}"


def router_logits(
    x: Float[Tensor, "tokens d_model"],
    weight: Float[Tensor, "n_experts d_model"],
    bias: Float[Tensor, " n_experts"] | None = None,
) -> Float[Tensor, "tokens n_experts"]:
    """x W^T + bias in float32, or in float64 for a float64 model; under autocast too.

    bfloat16 keeps 8 bits: close logits would tie, and a token would flip to another expert.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if autocast_dtype(x) is None:
        return F.linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight, bias)
