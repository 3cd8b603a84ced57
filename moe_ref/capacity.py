"""Capacity: how many tokens an expert takes, and what becomes of those it has no place for."""

import math
from dataclasses import KW_ONLY, dataclass, replace
from fractions import Fraction

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ._validate import check_choice
from .routing import Routing, count, top_k


@dataclass(frozen=True)
class Capacity:
    """Limits every expert to `factor` times its even share of the assignments.

    limit = max(minimum, ceil(factor * k * tokens / n_experts)), and at most all tokens; padding is
    not counted. Other code differs: Mesh-TensorFlow leaves out k, and like MegaBlocks rounds down.

    | overflow | what becomes of an assignment without a place |
    |---|---|
    | drop | nobody serves it; the weights of the token's other slots stay as they are |
    | reroute | the token's next best expert takes it that has room and does not serve it yet |

    | priority | who keeps a place |
    |---|---|
    | choice | all first choices before any second, each in the order of the tokens |
    | position | the tokens in their order |
    | score | the larger weight first |

    Args:
        factor: the limit as a multiple of an even share; infinity: no limit.
        overflow: a name in the first table.
        priority: a name in the second.
        minimum: the least limit.

    Raises:
        ValueError: if the factor is not positive, minimum is below 0 or a name is unknown.

    Example:
        >>> routing = TopKRouter(d_model=4, n_experts=2, k=1)(torch.ones(10, 4))
        >>> sorted(routing.counts.tolist()), sorted(Capacity(1.5)(routing).counts.tolist())
        ([0, 10], [0, 8])

    Source: GShard 2006.16668, section 3.2; Switch 2101.03961, equation 3; priority by score:
    Riquelme et al. 2021 (2106.05974), section 4.1.
    """

    factor: float
    _: KW_ONLY
    overflow: str = "drop"
    priority: str = "choice"
    minimum: int = 1

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"factor={self.factor} is not more than 0")
        if self.minimum < 0:
            raise ValueError(f"minimum={self.minimum} is less than 0")
        check_choice("overflow", self.overflow, ("drop", "reroute"))
        check_choice("priority", self.priority, ("choice", "position", "score"))

    def limit(self, tokens: int, k: int, n_experts: int) -> int:
        """The most tokens an expert takes of a batch of this size."""
        if math.isinf(self.factor):
            return tokens
        # Exact, with the factor as written: in floats 1.1 * 100 / 10 is 11.000000000000002.
        share = Fraction(str(self.factor)) * k * tokens / n_experts
        return min(tokens, max(self.minimum, math.ceil(share)))

    def __call__(self, routing: Routing) -> Routing:
        """The routing with no expert above its limit; demand, logits and scores are kept."""
        if math.isinf(self.factor):
            return routing
        slots, n_experts = routing.experts.shape[1], routing.n_experts
        limit = self.limit(int(routing.mask.sum()), slots, n_experts)
        room = torch.full_like(routing.demand, limit)
        order = self._order(routing.weights)
        admitted = torch.empty_like(order, dtype=torch.bool)
        admitted[order] = admit(routing.experts.flatten()[order], room)
        admitted = admitted.view(routing.experts.shape)
        experts = routing.experts.masked_fill(~admitted, n_experts)
        weights = routing.weights.masked_fill(~admitted, 0)
        if self.overflow == "reroute":
            experts = reroute(routing, experts, order, room - count(experts, n_experts))
            weights = rerouted_weights(routing, experts)
        return replace(routing, experts=experts, weights=weights)

    def _order(self, weights: Float[Tensor, "tokens slots"]) -> Int[Tensor, " assignments"]:
        """All assignments (token * slots + slot) in the order in which they take places."""
        if self.priority == "score":
            return weights.detach().flatten().argsort(descending=True, stable=True)
        places = torch.arange(weights.numel(), device=weights.device)
        if self.priority == "position":
            return places
        return places.view(weights.shape).T.flatten()


def admit(
    arriving: Int[Tensor, " assignments"], room: Int[Tensor, " n_experts"]
) -> Bool[Tensor, " assignments"]:
    """Which assignments, arriving in this order, get a place; expert e has room[e] left."""
    sizes = count(arriving, len(room) + 1)
    by_expert = arriving.argsort(stable=True)  # keeps the order within an expert
    ahead = (sizes.cumsum(0) - sizes)[arriving[by_expert]]
    place = torch.empty_like(arriving)
    place[by_expert] = torch.arange(len(arriving), device=arriving.device) - ahead
    room = torch.cat([room, room.new_zeros(1)])  # expert n_experts, nobody, has no place
    return place < room[arriving]


def reroute(
    routing: Routing,
    experts: Int[Tensor, "tokens slots"],
    order: Int[Tensor, " assignments"],
    room: Int[Tensor, " n_experts"],
) -> Int[Tensor, "tokens slots"]:
    """Find other experts for the assignments without a place, in rounds.

    In each round every unplaced slot of a token asks for the next best expert that has room and
    does not serve the token yet; the experts admit by priority. An expert that turns one away is
    full, so there are at most n_experts rounds.
    """
    dropped = (experts == routing.n_experts) & (routing.experts < routing.n_experts)
    experts = experts.clone()
    unplaced = order[dropped.flatten()[order]]
    while len(unplaced) and room.any():
        wanted = next_choices(routing.scores, experts, unplaced, room)
        admitted = admit(wanted, room)
        experts.view(-1)[unplaced[admitted]] = wanted[admitted]
        room = room - count(wanted[admitted], routing.n_experts)
        # A slot that found no expert to ask never will: experts only fill up.
        unplaced = unplaced[(wanted < routing.n_experts) & ~admitted]
    return experts


def next_choices(
    scores: Float[Tensor, "tokens n_experts"],
    experts: Int[Tensor, "tokens slots"],
    unplaced: Int[Tensor, " assignments"],
    room: Int[Tensor, " n_experts"],
) -> Int[Tensor, " assignments"]:
    """The next best expert with room for each unplaced slot; those of a token all differ."""
    n_experts = len(room)
    asking = torch.zeros_like(experts, dtype=torch.bool)
    asking.view(-1)[unplaced] = True
    tokens = asking.any(dim=1).nonzero()[:, 0]
    turn = asking[tokens].cumsum(dim=1)  # 1 at a token's first unplaced slot, 2 at its second, ...
    most = min(int(turn[:, -1].max()), n_experts)
    closed = (room == 0).repeat(len(tokens), 1)
    closed = F.pad(closed, (0, 1)).scatter_(1, experts[tokens], True)[:, :n_experts]
    open_scores = scores.detach()[tokens].masked_fill_(closed, -1)
    choices = top_k(open_scores, most)
    choices = choices.masked_fill(open_scores.gather(1, choices) < 0, n_experts)
    choices = F.pad(choices, (1, 0), value=n_experts)
    wishes = experts.new_full(experts.shape, n_experts)
    wishes[tokens] = choices.gather(1, turn.masked_fill(turn > most, 0))
    return wishes.view(-1)[unplaced]


def rerouted_weights(
    routing: Routing, experts: Int[Tensor, "tokens slots"]
) -> Float[Tensor, "tokens slots"]:
    """Weights of the experts now used: the new score, normalised as the slot's old one was."""
    n_experts = routing.n_experts
    scores = F.pad(routing.scores, (0, 1))  # nobody has score 0
    before, after = scores.gather(1, routing.experts), scores.gather(1, experts)
    moved = routing.weights * after / before.clamp(min=1e-20)
    kept = torch.where(experts == routing.experts, routing.weights, moved)
    return kept.masked_fill(experts == n_experts, 0)
