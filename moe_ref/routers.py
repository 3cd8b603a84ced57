"""Routers: hidden states in, a `Routing` out. One class for each published rule."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .ffn import check_sizes
from .routing import Routing, count


class TopKRouter(nn.Module):
    """Each token goes to the k experts with the largest softmax score.

    p = softmax(x W^T); the k largest are chosen, ties to the lower index; the weights are those
    p, divided by their sum if `renormalize` (Mixtral, Qwen3: yes; OLMoE: no). With k = 1 and
    `renormalize` every weight is 1, so the router gets no gradient: leave it off there.

    Args:
        d_model: features of a token.
        n_experts: experts to choose from; `weight` is [n_experts, d_model].
        k: experts per token.
        renormalize: whether the weights of a token sum to 1.

    Raises:
        ValueError: if a size is below 1 or k is more than n_experts.

    Source: Shazeer et al. 2017 (1701.06538), without its noise; Mixtral 2401.04088, section 2.1;
    OLMoE 2409.02060, section 2.
    """

    def __init__(self, d_model: int, n_experts: int, k: int, *, renormalize: bool = True) -> None:
        super().__init__()
        check_sizes(d_model=d_model, n_experts=n_experts, k=k)
        if k > n_experts:
            raise ValueError(f"k={k} is more than n_experts={n_experts}")
        self.n_experts = n_experts
        self.k = k
        self.renormalize = renormalize
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        nn.init.uniform_(self.weight, -(d_model**-0.5), d_model**-0.5)

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        *,
        mask: Bool[Tensor, " tokens"] | None = None,
        token_ids: Int[Tensor, " tokens"] | None = None,
    ) -> Routing:
        """Route each token; `mask` is False at padding, and `token_ids` plays no part here."""
        if mask is None:
            mask = torch.ones(len(x), dtype=torch.bool, device=x.device)
        else:
            x = x.masked_fill(~mask[:, None], 0)  # padding may hold anything, even NaN
        logits = router_logits(x, self.weight)
        scores = logits.softmax(dim=-1)
        experts = top_k(scores, self.k)
        weights = scores.gather(-1, experts)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return decide(experts, weights, logits, scores, mask)


def router_logits(
    x: Float[Tensor, "tokens d_model"], weight: Float[Tensor, "n_experts d_model"]
) -> Float[Tensor, "tokens n_experts"]:
    """x W^T in float32, whatever the dtype of the model, under autocast too.

    bfloat16 keeps 8 bits: close logits would tie, and a token would flip to another expert.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float())


def top_k(scores: Float[Tensor, "tokens n_experts"], k: int) -> Int[Tensor, "tokens k"]:
    """Indices of the k largest scores in descending order, ties to the lower index.

    torch.topk leaves the order of ties open, so devices differ; a stable sort settles it.
    """
    return scores.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]


def decide(
    experts: Int[Tensor, "tokens slots"],
    weights: Float[Tensor, "tokens slots"],
    logits: Float[Tensor, "tokens n_experts"],
    scores: Float[Tensor, "tokens n_experts"],
    mask: Bool[Tensor, " tokens"],
) -> Routing:
    """The `Routing` of these choices: padding is served by nobody and asks for nobody."""
    n_experts = logits.shape[-1]
    padding = ~mask[:, None]
    experts = experts.masked_fill(padding, n_experts)
    return Routing(
        experts=experts,
        weights=weights.masked_fill(padding, 0),
        logits=logits,
        scores=scores.masked_fill(padding, 0),
        demand=count(experts, n_experts),
        mask=mask,
    )
