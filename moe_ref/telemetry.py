"""What an operator watches: how a layer's experts were used, over many batches."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ._validate import check_sizes
from .routing import Routing, count, normalized


@dataclass(eq=False)
class Tally:
    """Sums over tokens, from which every figure follows; they add up from batch to batch.

    Example:
        >>> routing = TopKRouter(d_model=4, n_experts=3, k=1)(torch.ones(5, 4))
        >>> both = tally(routing, routing.mask) + tally(routing, routing.mask)
        >>> both.tokens, both.imbalance, both.dead
        (10, 3.0, 2)
    """

    tokens: int
    demand: Int[Tensor, " n_experts"]  # assignments that asked for each expert
    served: Int[Tensor, " n_experts"]  # assignments that each expert served
    overflow: Int[Tensor, " n_experts"]  # assignments that asked for it and that it did not serve
    nats: float  # entropy of the scores, summed over tokens

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Tally)))

    @property
    def dropped_fraction(self) -> float:
        """Share of the assignments that no expert served."""
        total = int(self.demand.sum())
        return (total - int(self.served.sum())) / total if total else 0.0

    @property
    def imbalance(self) -> float:
        """Demand for the busiest expert over the mean demand: 1 when even."""
        mean = self.demand.double().mean().item()
        return self.demand.max().item() / mean if mean else 1.0

    @property
    def variation(self) -> float:
        """Coefficient of variation of the demand: standard deviation over mean."""
        mean = self.demand.double().mean().item()
        return self.demand.double().std(correction=0).item() / mean if mean else 0.0

    @property
    def entropy(self) -> float:
        """Mean entropy of a token's scores in nats, 0 to log n_experts."""
        return self.nats / self.tokens if self.tokens else 0.0

    @property
    def dead(self) -> int:
        """Experts that no token asked for."""
        return int((self.demand == 0).sum())


class RoutingStats:
    """Adds up the routings of a layer: all of them, and by label where tokens have labels.

    Args:
        n_experts: experts of the layer.

    Attributes:
        overall: the `Tally` of all tokens.
        by_label: that of the tokens of each label.

    Raises:
        ValueError: if n_experts is below 1; later, for a routing of another number of experts, or
            labels that don't fit the tokens.

    Example:
        >>> stats = RoutingStats(n_experts=4)
        >>> stats.update(TopKRouter(d_model=3, n_experts=4, k=2)(torch.ones(5, 3)), list("aabbb"))
        >>> stats.overall.tokens, stats.by_label["b"].tokens, stats.overall.imbalance
        (5, 3, 2.0)
    """

    def __init__(self, n_experts: int) -> None:
        check_sizes(n_experts=n_experts)
        self.n_experts = n_experts
        zeros = torch.zeros(n_experts, dtype=torch.long, device="cpu")
        self.overall = self._nothing = Tally(0, zeros, zeros, zeros, 0.0)
        self.by_label: dict[str, Tally] = {}

    def update(self, routing: Routing, labels: Sequence[str] | None = None) -> None:
        """Count one routing; `labels` has one for every token, padding included."""
        if routing.n_experts != self.n_experts:
            raise ValueError(
                f"the routing has n_experts={routing.n_experts}, but these stats have "
                f"n_experts={self.n_experts}"
            )
        if labels is not None and len(labels) != len(routing.mask):
            raise ValueError(f"{len(labels)} labels for {len(routing.mask)} tokens")
        self.overall += tally(routing, routing.mask)
        if labels is None:
            return
        for label in dict.fromkeys(labels):
            chosen = torch.tensor([name == label for name in labels], device=routing.mask.device)
            self._add(label, tally(routing, chosen))

    def merge(self, other: "RoutingStats") -> "RoutingStats":
        """What these stats would hold had they seen the routings of both."""
        if other.n_experts != self.n_experts:
            raise ValueError(f"n_experts={other.n_experts} is not n_experts={self.n_experts}")
        merged = RoutingStats(self.n_experts)
        merged.overall = self.overall + other.overall
        for stats in (self, other):
            for label, counted in stats.by_label.items():
                merged._add(label, counted)
        return merged

    def _add(self, label: str, counted: Tally) -> None:
        self.by_label[label] = self.by_label.get(label, self._nothing) + counted

    def to_frame(self) -> Any:
        """A pandas table: "all" and each label, by figure and by tokens that each expert served."""
        import pandas

        rows = {"all": self.overall, **self.by_label}
        return pandas.DataFrame.from_dict(
            {
                label: {
                    "tokens": t.tokens,
                    "dropped": t.dropped_fraction,
                    "overflow": int(t.overflow.sum()),
                    "imbalance": t.imbalance,
                    "variation": t.variation,
                    "entropy": t.entropy,
                    "dead": t.dead,
                    **{f"expert {e}": n for e, n in enumerate(t.served.tolist())},
                }
                for label, t in rows.items()
            },
            orient="index",
        )


class Trace:
    """Which experts each MoE layer asked for, forward by forward: what `offload.simulate` replays.

    Attributes:
        events: in the order in which they happened, each a layer (counted from 0, dense blocks left
            out), experts, and whether these were only guessed, before the layer's turn.

    Example:
        >>> trace, router = Trace(), TopKRouter(d_model=4, n_experts=8, k=2)
        >>> trace.add([router(torch.ones(5, 4)), router(-torch.ones(5, 4))])  # Output.routings
        >>> [(layer, len(experts), guess) for layer, experts, guess in trace.events]
        [(0, 2, False), (1, 2, False)]
    """

    def __init__(self) -> None:
        self.events: list[tuple[int, tuple[int, ...], bool]] = []

    def add(self, routings: Sequence[Routing]) -> None:
        """One forward: the routing of each MoE layer."""
        for layer, routing in enumerate(routings):
            self.touched(layer, routing.counts.nonzero().flatten().tolist())

    def touched(self, layer: int, experts: Sequence[int]) -> None:
        """A layer asked for these experts."""
        self.events.append((layer, tuple(experts), False))

    def guessed(self, layer: int, experts: Sequence[int]) -> None:
        """A layer will likely ask for these, likeliest first."""
        self.events.append((layer, tuple(experts), True))

    def popular(self) -> list[tuple[int, int]]:
        """Layer and expert of all that were asked for, most often first, then in order."""
        asked = Counter((n, e) for n, experts, guess in self.events if not guess for e in experts)
        return sorted(asked, key=lambda key: (-asked[key], key))

    @property
    def guessed_right(self) -> float:
        """Share of the experts asked for that had been guessed, in layers with a guess; else 0."""
        guesses: dict[int, tuple[int, ...]] = {}
        right = total = 0
        for layer, experts, guess in self.events:
            if guess:
                guesses[layer] = experts
            elif layer in guesses:
                right += len(set(experts) & set(guesses.pop(layer)))
                total += len(experts)
        return right / max(1, total)


@torch.no_grad()
def tally(routing: Routing, chosen: Bool[Tensor, " tokens"]) -> Tally:
    """The sums over the chosen tokens of a routing, padding left out, on the CPU."""
    n_experts, keep = routing.n_experts, routing.mask & chosen
    asked, served = routing.asked[keep], routing.experts[keep]
    gone = asked.masked_fill(asked == served, n_experts)
    shares = normalized(routing.scores[keep].double())
    return Tally(
        tokens=len(asked),
        demand=count(asked, n_experts).cpu(),
        served=count(served, n_experts).cpu(),
        overflow=count(gone, n_experts).cpu(),
        nats=torch.special.entr(shares).sum().item(),
    )
