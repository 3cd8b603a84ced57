"""Keeping experts busy: the auxiliary losses with their registry, and the bias that needs none.

Every loss is a `BalanceLoss`: that is where its arguments are described. None counts padding.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .routing import NoisyRouting, Routing, normalized


@runtime_checkable
class BalanceLoss(Protocol):
    """A loss of one layer's routing.

    Training sums it over all MoE layers and multiplies by its coefficient in
    `TrainingConfig.balance`. A key there is a name in `LOSSES` or a function of your own, which is
    recorded under its own name.

    Args:
        routing: all tokens of a batch, after capacity. `scores` and `logits` carry the gradient;
            `demand` is a count, taken before capacity, and carries none.
        seq: tokens of each sequence, for a loss taken sequence by sequence; None: all are one.

    Returns:
        A scalar; 0 if every token is padding.

    Example:
        >>> def favourite(routing, *, seq=None):
        ...     return mean_scores(routing).max()
        >>> routing = TopKRouter(d_model=8, n_experts=4, k=2)(torch.zeros(3, 8))
        >>> sums(resolve({favourite: 0.1}), [routing, routing], seq=3)["favourite"].item()
        0.5
    """

    def __call__(self, routing: Routing, *, seq: int | None = None) -> Float[Tensor, ""]: ...


def importance_loss(routing: Routing, *, seq: int | None = None) -> Float[Tensor, ""]:
    """Squared coefficient of variation of the importance, the sum of an expert's weights.

    It is 0 at perfect balance.

    Source: Shazeer et al. 2017 (1701.06538), equations 6 and 7.
    """
    sums = routing.weights.new_zeros(routing.n_experts + 1)
    sums = sums.index_add(0, routing.experts.flatten(), routing.weights.flatten())
    return squared_variation(sums[:-1])


def load_loss(routing: Routing, *, seq: int | None = None) -> Float[Tensor, ""]:
    """Squared coefficient of variation of the smooth load of a `NoisyTopKRouter`.

    The load of expert i is the sum over tokens of the probability that i is chosen if its noise
    alone is drawn again: Phi((h_i - threshold) / sigma_i), where the threshold is the k-th largest
    noisy logit of the others. The loss is 0 at perfect balance.

    Raises:
        ValueError: for the routing of another router, which has no noise.

    Source: Shazeer et al. 2017 (1701.06538), appendix A, equations 8 to 11.
    """
    if not isinstance(routing, NoisyRouting):
        raise ValueError(f"load_loss needs a NoisyTopKRouter's routing, not a {type(routing)}")
    k = routing.experts.shape[1]
    if k == routing.n_experts:
        return routing.logits.sum() * 0  # all are always chosen
    best = routing.noisy.topk(k + 1, dim=-1).values
    last_in, first_out = best[:, k - 1 : k], best[:, k:]
    # Among the others of a chosen expert the k-th largest is the first that was left out.
    threshold = torch.where(routing.noisy > first_out, first_out, last_in)
    sigma = routing.sigma.clamp(min=1e-6)  # without noise the gradient would be NaN
    chance = torch.special.ndtr((routing.logits - threshold) / sigma)
    return squared_variation(chance.masked_fill(~routing.mask[:, None], 0).sum(dim=0))


def switch_loss(routing: Routing, *, seq: int | None = None) -> Float[Tensor, ""]:
    """n_experts * sum of f_i P_i, the auxiliary loss of Switch and GShard.

    f_i is the share of all assignments that asked for expert i, before capacity; P_i is its mean
    score, where a token's scores sum to 1. The loss is 1 at perfect balance, and n_experts when a
    sure top-1 router collapses. The usual coefficient is 1e-2. Hugging Face's function uses k * f_i
    and pools all layers.

    Example:
        >>> router = TopKRouter(3, n_experts=3, k=1)
        >>> router.weight.data = 9 * torch.eye(3)  # feature i calls for expert i
        >>> [f"{switch_loss(router(torch.eye(3)[tokens])):.2f}" for tokens in ([0, 1, 2], [0, 0])]
        ['1.00', '3.00']

    Source: Fedus et al. 2021 (2101.03961), equations 4 to 6.
    """
    return routing.n_experts * (routing.load_share * mean_scores(routing)).sum()


def z_loss(routing: Routing, *, seq: int | None = None) -> Float[Tensor, ""]:
    """Mean over tokens of the squared logsumexp of the logits.

    It balances nothing: it keeps logits small, where the softmax is exact. The usual coefficient is
    1e-3.

    Source: ST-MoE, Zoph et al. 2022 (2202.08906), equation 5.
    """
    squares = routing.logits.logsumexp(dim=-1).square()
    return squares.masked_fill(~routing.mask, 0).sum() / routing.mask.sum().clamp(min=1)


def sequence_loss(routing: Routing, *, seq: int | None = None) -> Float[Tensor, ""]:
    """`switch_loss` of each sequence of `seq` tokens, averaged over sequences.

    Sequences that are all padding don't count. The loss is 1 at perfect balance within each
    sequence. The usual coefficient is 1e-4.

    Raises:
        ValueError: if `seq` does not divide the tokens.

    Source: DeepSeek-V3 2412.19437, equations 17 to 20.
    """
    tokens, n_experts = routing.scores.shape
    seq = seq or max(tokens, 1)
    if tokens % seq:
        raise ValueError(f"seq={seq} does not divide the {tokens} tokens of the routing")
    chosen = torch.nn.functional.one_hot(routing.asked, n_experts + 1)[..., :n_experts]
    requested = chosen.sum(dim=1).view(-1, seq, n_experts).sum(dim=1)
    share = requested / requested.sum(dim=-1, keepdim=True).clamp(min=1)
    real = routing.mask.view(-1, seq).sum(dim=1)
    shares = normalized(routing.scores).view(-1, seq, n_experts)
    mean = shares.sum(dim=1) / real.clamp(min=1)[:, None]
    losses = n_experts * (share * mean).sum(dim=-1)
    return losses.sum() / (real > 0).sum().clamp(min=1)


LOSSES: dict[str, BalanceLoss] = {
    "importance": importance_loss,
    "load": load_loss,
    "switch": switch_loss,
    "z": z_loss,
    "sequence": sequence_loss,
}


def resolve(wanted: Mapping[Any, float]) -> dict[str, tuple[BalanceLoss, float]]:
    """Losses and coefficients by name, from a mapping such as `{"switch": 0.01, my_loss: 0.1}`.

    Raises:
        ValueError: for an unknown name, two losses of one name, or an impossible coefficient.
    """
    losses: dict[str, tuple[BalanceLoss, float]] = {}
    for key, coefficient in wanted.items():
        loss = LOSSES.get(key, key)
        if not callable(loss):
            raise ValueError(
                f"balance names {key!r}, which is none of {', '.join(LOSSES)}, and no function"
            )
        name = key if isinstance(key, str) else getattr(key, "__name__", type(key).__name__)
        if name in losses:
            raise ValueError(f"balance holds two losses called {name!r}: rename one")
        if not 0 <= coefficient < math.inf:
            raise ValueError(f"balance gives {name} the coefficient {coefficient}, not 0 or more")
        losses[name] = loss, coefficient
    return losses


def sums(
    losses: Mapping[str, tuple[BalanceLoss, float]], routings: Sequence[Routing], *, seq: int
) -> dict[str, Float[Tensor, ""]]:
    """Each loss, without its coefficient, summed over the routings of all MoE layers.

    Raises:
        ValueError: if a loss gives something other than a scalar tensor.
    """
    found = {name: [loss(r, seq=seq) for r in routings] for name, (loss, _) in losses.items()}
    for name, values in found.items():
        if any(not isinstance(value, Tensor) or value.ndim for value in values):
            raise ValueError(f"balance loss {name} gave {values[0]!r}, which is no scalar tensor")
    return {name: torch.stack(values).sum() for name, values in found.items() if values}


@torch.no_grad()
def update_bias(router: nn.Module, routing: Routing, rate: float = 1e-3) -> None:
    """Move a router's selection bias down for busy experts and up for idle ones.

    b_i += rate * sign(mean demand - demand_i), where demand is summed over the ranks of
    torch.distributed if it runs. Call this once after each optimiser step; in evaluation it does
    nothing.

    Args:
        router: has a buffer `bias` [n_experts], as a `TopKRouter` with selection_bias=True has.
        routing: what the router decided.
        rate: size of the step.

    Raises:
        ValueError: if the router has no selection bias.

    Example:
        >>> router = TopKRouter(3, n_experts=3, k=1, selection_bias=True)
        >>> router.weight.data = torch.eye(3)  # feature i calls for expert i
        >>> update_bias(router, router(torch.eye(3)[[0, 0, 1, 2, 0, 1]]), rate=0.5)
        >>> router.bias
        tensor([-0.5000,  0.0000,  0.5000])

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
    """P: the mean score of each expert over all tokens but padding; a token's scores sum to 1."""
    return normalized(routing.scores).sum(dim=0) / routing.mask.sum().clamp(min=1)
