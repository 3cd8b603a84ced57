"""Capacity: how many tokens an expert takes, and what becomes of those it has no place for."""

import dataclasses
import math
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .routing import Routing, count, top_k


class Capacity:
    """Limits every expert to `factor` times its even share of the assignments.

    limit = max(minimum, ceil(factor * k * tokens / n_experts)), never more than the tokens, padding
    not counted. Other codes differ: Mesh-TensorFlow leaves out k, and like MegaBlocks rounds down.

    Args:
        factor: places over even share; infinity changes nothing.
        overflow: what becomes of an assignment without a place. "drop": nobody serves it, and the
            weights of the token's other slots stay as they are. "reroute": the token tries its
            next best expert that has room and that it does not use, and is dropped if none has.
        priority: who keeps a place. "choice": all first choices before any second, in the order of
            the tokens. "position": in the order of the tokens. "score": the larger weight first.
        minimum: places that every expert has at least.

    Raises:
        ValueError: if the factor is not positive, minimum is below 0 or a name is unknown.

    Source: GShard 2006.16668, section 3.2; Switch 2101.03961, equation 3; priority by score:
    Riquelme et al. 2021 (2106.05974), section 4.1.
    """

    def __init__(
        self,
        factor: float,
        *,
        overflow: str = "drop",
        priority: str = "choice",
        minimum: int = 1,
    ) -> None:
        if not factor > 0:
            raise ValueError(f"factor={factor} is not more than 0")
        if minimum < 0:
            raise ValueError(f"minimum={minimum} is less than 0")
        if overflow not in ("drop", "reroute"):
            raise ValueError(f"overflow={overflow!r} is neither drop nor reroute")
        if priority not in ("choice", "position", "score"):
            raise ValueError(f"priority={priority!r} is none of choice, position, score")
        self.factor = factor
        self.overflow = overflow
        self.priority = priority
        self.minimum = minimum

    def limit(self, tokens: int, k: int, n_experts: int) -> int:
        """Places of each expert for a batch of this size."""
        if math.isinf(self.factor):
            return tokens
        # The factor as it is written: 1.1 * 100 / 10 is 11, not the 11.000000000000002 of floats.
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
        admitted = admit(routing.experts, order, room)
        experts = routing.experts.masked_fill(~admitted, n_experts)
        weights = routing.weights.masked_fill(~admitted, 0)
        if self.overflow == "reroute":
            experts = self._reroute(routing, experts, room - count(experts, n_experts))
            weights = rerouted_weights(routing, experts)
        return dataclasses.replace(
            routing, experts=experts, weights=weights, asked=routing.requests
        )

    def _order(self, weights: Float[Tensor, "tokens slots"]) -> Int[Tensor, " assignments"]:
        """All assignments (token * slots + slot), those that keep a place first at the front."""
        if self.priority == "score":
            return weights.detach().flatten().argsort(descending=True, stable=True)
        places = torch.arange(weights.numel(), device=weights.device)
        if self.priority == "position":
            return places
        return places.view(weights.shape).T.flatten()

    def _reroute(
        self,
        routing: Routing,
        experts: Int[Tensor, "tokens slots"],
        room: Int[Tensor, " n_experts"],
    ) -> Int[Tensor, "tokens slots"]:
        """Find places for the dropped, in rounds.

        In a round every token asks for as many experts as it has slots without a place, the best
        ones with room that it does not use; each expert admits by priority. An expert that turned
        somebody away is full, so there are at most n_experts rounds.
        """
        n_experts, slots = routing.n_experts, experts.shape[1]
        homeless = (experts == n_experts) & (routing.experts < n_experts)
        rank = torch.empty(experts.numel(), dtype=torch.long, device=experts.device)
        order = self._order(routing.weights)
        rank[order] = torch.arange(len(order), device=order.device)
        while homeless.any() and room.any():
            tokens = homeless.any(dim=1).nonzero()[:, 0]
            asked = ask(routing.scores[tokens], experts[tokens], homeless[tokens], room)
            local = rank.view(-1, slots)[tokens].flatten().argsort()
            admitted = admit(asked, local, room)
            experts = experts.index_copy(0, tokens, torch.where(admitted, asked, experts[tokens]))
            room = room - count(asked.masked_fill(~admitted, n_experts), n_experts)
            # Whoever found nobody to ask never will: experts only fill up.
            homeless[tokens] = (asked < n_experts) & ~admitted
        return experts


def admit(
    experts: Int[Tensor, "tokens slots"],
    order: Int[Tensor, " assignments"],
    room: Int[Tensor, " n_experts"],
) -> Bool[Tensor, "tokens slots"]:
    """Which assignments get one of the `room` places of their expert, if they come in `order`."""
    n_experts = len(room)
    arriving = experts.flatten()[order]
    by_expert = arriving.argsort(stable=True)  # keeps the order within an expert
    sizes = count(experts, n_experts + 1)
    starts = (sizes.cumsum(0) - sizes)[arriving[by_expert]]
    place = torch.arange(len(order), device=order.device) - starts
    room_and_none = torch.cat([room, room.new_zeros(1)])  # expert n_experts, nobody, has no place
    admitted = torch.zeros_like(order, dtype=torch.bool)
    admitted[order[by_expert]] = place < room_and_none[arriving[by_expert]]
    return admitted.view(experts.shape)


def ask(
    scores: Float[Tensor, "tokens n_experts"],
    experts: Int[Tensor, "tokens slots"],
    homeless: Bool[Tensor, "tokens slots"],
    room: Int[Tensor, " n_experts"],
) -> Int[Tensor, "tokens slots"]:
    """For each slot without a place the next best expert with room, no two of a token alike."""
    tokens, n_experts = scores.shape
    used = torch.zeros(tokens, n_experts + 1, dtype=torch.bool, device=scores.device)
    used.scatter_(1, experts, True)
    open_scores = scores.detach().masked_fill(used[:, :n_experts] | (room == 0), -1)
    wanted = min(int(homeless.sum(dim=1).max()), n_experts)
    choices = top_k(open_scores, wanted)
    choices = choices.masked_fill(open_scores.gather(1, choices) < 0, n_experts)
    turn = (homeless.cumsum(dim=1) - 1).clamp(0, wanted - 1)  # first homeless slot, second, ...
    beyond = homeless.cumsum(dim=1) > wanted
    return choices.gather(1, turn).masked_fill(~homeless | beyond, n_experts)


def rerouted_weights(
    routing: Routing, experts: Int[Tensor, "tokens slots"]
) -> Float[Tensor, "tokens slots"]:
    """Weights of the experts now used: the new score, normalised as the slot's old one was."""
    n_experts = routing.n_experts
    scores = torch.nn.functional.pad(routing.scores, (0, 1))  # nobody has score 0
    before, after = scores.gather(1, routing.experts), scores.gather(1, experts)
    moved = routing.weights * after / before.clamp(min=1e-20)
    kept = torch.where(experts == routing.experts, routing.weights, moved)
    return kept.masked_fill(experts == n_experts, 0)
