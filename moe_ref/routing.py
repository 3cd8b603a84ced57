"""The routing decision: which expert serves which token, and with what weight.

A `Routing` is plain data. A router makes it, a capacity rule edits it, the dispatcher moves tokens
by it, a loss grades it. Nothing that receives one needs to know how it was made.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Routing:
    """A sparse token-by-expert matrix: at most `slots` entries in each row.

    A slot that nobody serves (dropped, padding, unused) holds expert `n_experts` and weight 0.
    """

    experts: Int[Tensor, "tokens slots"]  # which expert serves this slot
    weights: Float[Tensor, "tokens slots"]  # float32 share of that expert's answer
    logits: Float[Tensor, "tokens n_experts"]  # float32, before any noise, bias or mask
    scores: Float[Tensor, "tokens n_experts"]  # float32 gate values of all experts
    demand: Int[Tensor, " n_experts"]  # tokens that asked for each expert, before capacity
    mask: Bool[Tensor, " tokens"]  # True for a real token, False for padding
    asked: Int[Tensor, "tokens slots"] | None = None  # experts before capacity, if that took any

    @property
    def n_experts(self) -> int:
        return self.logits.shape[-1]

    @property
    def counts(self) -> Int[Tensor, " n_experts"]:
        """Tokens each expert serves."""
        return count(self.experts, self.n_experts)

    @property
    def requests(self) -> Int[Tensor, "tokens slots"]:
        """Which expert each slot asked for, before capacity: `demand`, token by token."""
        return self.experts if self.asked is None else self.asked

    @property
    def overflow(self) -> Int[Tensor, " n_experts"]:
        """Tokens each expert was asked for and does not serve."""
        return (self.demand - self.counts).clamp(min=0)

    @property
    def dropped_fraction(self) -> Float[Tensor, ""]:
        """Share of the assignments asked for that nobody serves, 0 to 1."""
        asked = self.demand.sum()
        return (asked - self.counts.sum()) / asked.clamp(min=1)

    @property
    def load(self) -> Float[Tensor, " n_experts"]:
        """Share of all assignments that asked for each expert: the f of the balance losses."""
        return self.demand / self.demand.sum().clamp(min=1)

    @property
    def entropy(self) -> Float[Tensor, ""]:
        """How undecided the router is: mean entropy of a token's scores in nats, 0 to log E."""
        shares = self.scores / self.scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        nats = torch.special.entr(shares).sum(dim=-1)
        return nats.sum() / self.mask.sum().clamp(min=1)  # padding has zero scores, so adds 0


@dataclass(frozen=True, eq=False, kw_only=True)
class NoisyRouting(Routing):
    """A `Routing` that also says what the noise was, as `balance.load_loss` asks."""

    noisy: Float[Tensor, "tokens n_experts"]  # logits with noise: what the choice was made by
    sigma: Float[Tensor, "tokens n_experts"]  # standard deviation of the noise


def count(experts: Int[Tensor, "*assignments"], n_experts: int) -> Int[Tensor, " n_experts"]:
    """How often each expert occurs; the entry `n_experts`, nobody, is not counted."""
    chosen = experts.flatten()
    totals = chosen.new_zeros(n_experts + 1).scatter_add_(0, chosen, torch.ones_like(chosen))
    return totals[:n_experts]


def top_k(scores: Float[Tensor, "tokens n_experts"], k: int) -> Int[Tensor, "tokens k"]:
    """Indices of the k largest scores in descending order, ties to the lower index.

    torch.topk leaves the order of ties open, so devices differ. It is given integers instead that
    sort like the scores and never tie: the bits of the score, then the index, counted down.
    """
    n_experts = scores.shape[-1]
    bits = (scores.detach().float() + 0.0).view(torch.int32)  # + 0.0: no negative zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort the other way round
    falling = torch.arange(n_experts - 1, -1, -1, device=scores.device)
    return ordered.long().mul_(n_experts).add_(falling).topk(k, dim=-1).indices
