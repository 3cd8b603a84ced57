"""The routing decision: which expert serves which token, and with what weight.

A `Routing` is plain data. A router makes it, a capacity rule edits it, a dispatch moves tokens by
it, a loss grades it. Nothing that receives one needs to know how it was made.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SORTED = 64  # experts that are sorted faster than bits are turned into numbers


@dataclass(frozen=True, eq=False, repr=False)
class Routing:
    """A sparse token-by-expert matrix: at most `slots` entries in each row.

    A slot that no expert serves (dropped, padding or unused) holds expert `n_experts`, called
    nobody, and weight 0. Weights, logits and scores are float32, or float64 in a float64 model.

    Example:
        >>> TopKRouter(d_model=4, n_experts=3, k=3)(torch.ones(5, 4))
        Routing(tokens=5, slots=3, n_experts=3, demand=[5, 5, 5], served=[5, 5, 5])
    """

    experts: Int[Tensor, "tokens slots"]  # which expert serves this slot
    weights: Float[Tensor, "tokens slots"]  # share of that expert's output
    logits: Float[Tensor, "tokens n_experts"]  # before any noise, bias or mask
    scores: Float[Tensor, "tokens n_experts"]  # softmax or sigmoid of the logits, all experts
    demand: Int[Tensor, " n_experts"]  # tokens that asked for each expert, before capacity
    mask: Bool[Tensor, " tokens"]  # True for a real token, False for padding
    asked: Int[Tensor, "tokens slots"] = None  # type: ignore[assignment]  # experts before capacity

    def __post_init__(self) -> None:
        if self.asked is None:
            object.__setattr__(self, "asked", self.experts)

    @property
    def n_experts(self) -> int:
        return self.logits.shape[-1]

    @property
    def counts(self) -> Int[Tensor, " n_experts"]:
        """Tokens each expert serves."""
        return count(self.experts, self.n_experts)

    @property
    def overflow(self) -> Int[Tensor, " n_experts"]:
        """Tokens that asked for each expert beyond those it serves."""
        return (self.demand - self.counts).clamp(min=0)

    @property
    def dropped_fraction(self) -> Float[Tensor, ""]:
        """Share of the assignments asked for that nobody serves, 0 to 1."""
        total = self.demand.sum()
        return (total - self.counts.sum()) / total.clamp(min=1)

    @property
    def load_share(self) -> Float[Tensor, " n_experts"]:
        """Share of all assignments that asked for each expert: the f of the balance losses."""
        return self.demand / self.demand.sum().clamp(min=1)

    @property
    def imbalance(self) -> Float[Tensor, ""]:
        """Demand for the busiest expert over the mean demand: 1 when even, at most n_experts."""
        return self.load_share.max() * self.n_experts

    @property
    def entropy(self) -> Float[Tensor, ""]:
        """How undecided the router is: mean entropy of a token's scores, in nats."""
        nats = torch.special.entr(normalized(self.scores)).sum()  # padding has scores of 0, adds 0
        return nats / self.mask.sum().clamp(min=1)

    def __repr__(self) -> str:
        tokens, slots = self.experts.shape
        sizes = f"tokens={tokens}, slots={slots}, n_experts={self.n_experts}"
        if self.demand.is_meta:
            return f"{type(self).__name__}({sizes}, on meta)"
        demand, served = _in_short(self.demand), _in_short(self.counts)
        return f"{type(self).__name__}({sizes}, demand={demand}, served={served})"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class NoisyRouting(Routing):
    """A `Routing` that also says what the noise was, for `balance.load_loss`.

    Example:
        >>> routing = NoisyTopKRouter(d_model=4, n_experts=3, k=1)(torch.randn(5, 4))
        >>> routing.noisy.equal(routing.logits), routing.sigma.shape
        (False, torch.Size([5, 3]))
    """

    noisy: Float[Tensor, "tokens n_experts"]  # logits with noise: what the choice was made by
    sigma: Float[Tensor, "tokens n_experts"]  # standard deviation of the noise


def decide(
    experts: Int[Tensor, "tokens slots"],
    weights: Float[Tensor, "tokens slots"],
    logits: Float[Tensor, "tokens n_experts"],
    scores: Float[Tensor, "tokens n_experts"],
    mask: Bool[Tensor, " tokens"] | None = None,
) -> Routing:
    """The `Routing` of these choices, in which padding asks for no expert and gets none.

    Args:
        experts: the choice for each slot; `n_experts` where a slot stays unused.
        weights: of the chosen experts.
        logits, scores: of all experts.
        mask: False at padding; None: no padding.
    """
    n_experts = logits.shape[-1]
    if mask is None:
        mask = torch.ones(len(experts), dtype=torch.bool, device=experts.device)
    else:
        padding = ~mask[:, None]
        experts = experts.masked_fill(padding, n_experts)
        weights, scores = weights.masked_fill(padding, 0), scores.masked_fill(padding, 0)
    return Routing(experts, weights, logits, scores, count(experts, n_experts), mask)


def count(experts: Int[Tensor, "*assignments"], n_experts: int) -> Int[Tensor, " n_experts"]:
    """How often each expert occurs; nobody, `n_experts`, is not counted.

    Raises:
        ValueError: on a CPU, for an id below 0 or above `n_experts`.
    """
    chosen = experts.flatten()
    totals = chosen.new_zeros(n_experts + 1)
    try:
        return totals.scatter_add(0, chosen, torch.ones_like(chosen))[:n_experts]
    except RuntimeError:  # looked for only now: a check in advance would slow down every call
        wrong = chosen[(chosen < 0) | (chosen > n_experts)].tolist()
        if not wrong:
            raise
    last = f"n_experts - 1={n_experts - 1} (and {n_experts} for nobody)"
    raise ValueError(f"expert id {wrong[0]} is outside 0 to {last}")


def top_k(scores: Float[Tensor, "tokens n_experts"], k: int) -> Int[Tensor, "tokens k"]:
    """Indices of the k largest scores in descending order, ties to the lower index.

    torch.topk leaves the order of ties open, so devices differ. A few experts are sorted. Of many,
    in float32, topk is given integers that sort like the scores and never tie: the bits of the
    score, then the index, counted down.
    """
    n_experts = scores.shape[-1]
    if n_experts <= SORTED or scores.dtype == torch.float64:  # which leaves no bits for the index
        order = scores.detach().sort(dim=-1, descending=True, stable=True).indices
        return order[:, :k].contiguous()  # a view would keep the order of all experts in memory
    bits = (scores.detach().float() + 0.0).view(torch.int32)  # + 0.0: no negative zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort the other way round
    falling = torch.arange(n_experts - 1, -1, -1, device=scores.device)
    return ordered.long().mul_(n_experts).add_(falling).topk(k, dim=-1).indices


def normalized(scores: Float[Tensor, "tokens n_experts"]) -> Float[Tensor, "tokens n_experts"]:
    """Scores divided by their sum per token, as softmax scores already are; padding stays 0."""
    return scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)


def _in_short(counts: Int[Tensor, " n_experts"]) -> str:
    """All counts if they are few, else their range."""
    numbers = counts.tolist()
    return str(numbers) if len(numbers) <= 16 else f"{min(numbers)} to {max(numbers)}"
