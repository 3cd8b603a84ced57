"""Keeping experts busy: the auxiliary losses, and the bias that needs none.

Every loss takes a `Routing` and gives a scalar; padding counts nowhere. Multiply by a coefficient
and add to the training loss, layer by layer.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .routing import NoisyRouting, Routing


def importance_loss(routing: Routing) -> Float[Tensor, ""]:
    """Squared coefficient of variation of the importance, an expert's sum of weights.

    0 at perfect balance. Source: Shazeer et al. 2017 (1701.06538), equations 6 and 7.
    """
    sums = routing.weights.new_zeros(routing.n_experts + 1)
    sums = sums.index_add(0, routing.experts.flatten(), routing.weights.flatten())
    return squared_variation(sums[:-1])


def load_loss(routing: Routing) -> Float[Tensor, ""]:
    """Squared coefficient of variation of the smooth load of a `NoisyTopKRouter`.

    The load of expert i is the sum over tokens of the probability that i is chosen if its noise
    alone is drawn again: Phi((h_i - threshold) / sigma_i), where the threshold is the k-th largest
    noisy logit of the others. 0 at perfect balance.

    Raises ValueError for the routing of another router, which has no noise.
    Source: Shazeer et al. 2017 (1701.06538), appendix A, equations 8 to 11.
    """
    if not isinstance(routing, NoisyRouting):
        raise ValueError(f"load_loss needs a NoisyTopKRouter's routing, not a {type(routing)}")
    k = routing.experts.shape[1]
    if k == routing.n_experts:
        return routing.logits.sum() * 0  # everybody is always chosen
    best = routing.noisy.topk(k + 1, dim=-1).values
    last_in, first_out = best[:, k - 1 : k], best[:, k:]
    # Among the others of a chosen expert the k-th largest is the first that was left out.
    threshold = torch.where(routing.noisy > first_out, first_out, last_in)
    sigma = routing.sigma.clamp(min=1e-6)  # of no noise at all the gradient would be nan
    chance = torch.special.ndtr((routing.logits - threshold) / sigma)
    return squared_variation(chance.masked_fill(~routing.mask[:, None], 0).sum(dim=0))


def switch_loss(routing: Routing) -> Float[Tensor, ""]:
    """n_experts * sum of f_i P_i, the auxiliary loss of Switch and GShard.

    f_i is the share of assignments that asked for expert i, before capacity; P_i the mean over
    tokens of its score, taken over all experts, and for sigmoid scores normalised per token. 1 at
    perfect balance, n_experts when a sure top-1 router collapses; coefficient 1e-2. Hugging Face's
    function uses k * f_i, so its value is k times this one, and pools all layers.

    Source: Fedus et al. 2021 (2101.03961), equations 4 to 6.
    """
    return routing.n_experts * (routing.load * mean_scores(routing)).sum()


def z_loss(routing: Routing) -> Float[Tensor, ""]:
    """Mean over tokens of the squared logsumexp of the logits; coefficient 1e-3.

    Keeps logits small, where float32 and the softmax are exact. Source: ST-MoE, Zoph et al. 2022
    (2202.08906), equation 5.
    """
    squares = routing.logits.logsumexp(dim=-1).square()
    return squares.masked_fill(~routing.mask, 0).sum() / routing.mask.sum().clamp(min=1)


def sequence_loss(routing: Routing, *, seq: int | None = None) -> Float[Tensor, ""]:
    """`switch_loss` of each sequence of `seq` tokens, averaged over sequences; coefficient 1e-4.

    The routing is taken as sequences of equal length, one after the other (None: as one).
    Sequences that are all padding don't count. 1 at perfect balance within each sequence.

    Raises ValueError if `seq` does not divide the tokens.
    Source: DeepSeek-V3 2412.19437, equations 17 to 20.
    """
    tokens, n_experts = routing.scores.shape
    seq = seq or max(tokens, 1)
    if tokens % seq:
        raise ValueError(f"seq={seq} does not divide the {tokens} tokens of the routing")
    chosen = torch.nn.functional.one_hot(routing.requests, n_experts + 1)[..., :n_experts]
    asked = chosen.sum(dim=1).view(-1, seq, n_experts).sum(dim=1)
    load = asked / asked.sum(dim=-1, keepdim=True).clamp(min=1)
    real = routing.mask.view(-1, seq).sum(dim=1)
    mean = token_shares(routing).view(-1, seq, n_experts).sum(dim=1) / real.clamp(min=1)[:, None]
    losses = n_experts * (load * mean).sum(dim=-1)
    return losses.sum() / (real > 0).sum().clamp(min=1)


@torch.no_grad()
def update_bias(router: nn.Module, routing: Routing, rate: float = 1e-3) -> None:
    """Move the selection bias of the busy down and of the idle up, by `rate`; no loss is needed.

    b_i += rate * sign(mean demand - demand_i), with the demand of all ranks if torch.distributed is
    running. Call it once after each optimiser step. Does nothing in evaluation.

    Raises ValueError if the router has no selection bias.
    Source: DeepSeek-V3 2412.19437, section 2.1.2; Wang et al. 2024 (2408.15664), algorithm 1.
    """
    if getattr(router, "bias", None) is None:
        raise ValueError("the router has no bias: make it with selection_bias=True")
    if not router.training:
        return
    demand = routing.demand.float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        demand = demand.clone()
        torch.distributed.all_reduce(demand)
    router.get_buffer("bias").add_(rate * (demand.mean() - demand).sign())


def squared_variation(values: Float[Tensor, " n_experts"]) -> Float[Tensor, ""]:
    """Unbiased variance over squared mean; 0 for a single value or if all are 0."""
    if len(values) == 1:
        return values.sum() * 0
    return values.var() / values.mean().square().clamp(min=1e-10)


def mean_scores(routing: Routing) -> Float[Tensor, " n_experts"]:
    """P: the mean over real tokens of the share of each expert in the token's scores."""
    return token_shares(routing).sum(dim=0) / routing.mask.sum().clamp(min=1)


def token_shares(routing: Routing) -> Float[Tensor, "tokens n_experts"]:
    """Scores that sum to 1 per token, as those of a softmax do already; 0 at padding."""
    return routing.scores / routing.scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)
