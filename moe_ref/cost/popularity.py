"""How many experts a batch touches: what a decode step has to read."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .._validate import check_sizes


def touched(
    n_experts: int,
    k: float,
    tokens: float,
    popularity: Sequence[float] | Float[Tensor, " n_experts"] | None = None,
) -> float:
    """Experts that at least one of `tokens` independent tokens visits, in the mean.

    A token visits k distinct experts. If expert i has the share p_i of all assignments, a token
    visits it with chance k * p_i exactly, and touched = sum over i of 1 - (1 - k * p_i)^tokens.
    Tokens of real text resemble each other and touch fewer: a `Routing` that was measured touched
    (routing.counts > 0).sum().

    Args:
        n_experts: experts of a layer.
        k: experts that serve a token; a mean in expert choice.
        tokens: independent tokens of the batch.
        popularity: each expert's share of the assignments; none is more than 1/k, since a token
            visits an expert once. None: all are equal. `shares_drawn` makes it from weights.

    Raises:
        ValueError: if a number is impossible, or the shares are no shares.

    Example:
        >>> round(touched(8, 2, tokens=4), 3)
        5.469
        >>> touched(4, 2, tokens=100, popularity=[0.5, 0.5, 0, 0])
        2.0
    """
    check_sizes(n_experts=n_experts)
    if not 0 < k <= n_experts:
        raise ValueError(f"k={k} is not more than 0 and at most n_experts={n_experts}")
    if not tokens >= 0:
        raise ValueError(f"tokens={tokens} must be 0 or more")
    if popularity is None:
        return n_experts * (1 - (1 - k / n_experts) ** tokens)
    shares = _shares("popularity", popularity, n_experts)
    if abs(shares.sum().item() - 1) > 1e-3:
        raise ValueError(f"popularity sums to {shares.sum().item():.4g}, not to 1")
    visits = k * shares / shares.sum()
    if visits.max() > 1 + 1e-6:
        raise ValueError(
            f"popularity[{int(shares.argmax())}]={shares.max().item():.4g} is more than 1/k for"
            f" k={k}: a token visits an expert once; shares_drawn turns weights into shares"
        )
    return (1 - (1 - visits.clamp(max=1)) ** tokens).sum().item()


def shares_drawn(
    weights: Sequence[float] | Float[Tensor, " n_experts"], k: int
) -> Float[Tensor, " n_experts"]:
    """Shares of the assignments if each token draws k distinct experts by these weights.

    The first is drawn in proportion to the weights, the next in proportion to those of the others,
    and so on. No expert is drawn twice, which makes the shares more even than the weights: a
    visit to the most popular is less likely than k times its weight, to the least popular more.

    Drawing so is a race: clock i rings after an exponential time of rate w_i, and the first k to
    ring are drawn. Expert i is among them if fewer than k others ring before it, which is an
    integral over its time.

    Args:
        weights: of each expert, 0 or more, in any unit; at least k are above 0.
        k: experts of a token.

    Raises:
        ValueError: if weights or k are impossible.

    Example:
        >>> shares_drawn([2.0, 1.0, 1.0], k=1)
        tensor([0.5000, 0.2500, 0.2500], dtype=torch.float64)
        >>> shares_drawn([2.0, 1.0, 1.0], k=2)  # of 1/2 - 1/12
        tensor([0.4167, 0.2917, 0.2917], dtype=torch.float64)

    Source: Efraimidis and Spirakis 2006, weighted random sampling with a reservoir.
    """
    check_sizes(k=k)
    rates = _shares("weights", weights, None)
    if k > (positive := int((rates > 0).sum())):
        raise ValueError(f"k={k} is more than the {positive} weights above 0")
    if k == positive:
        return (rates > 0).double() / k
    rates = rates / rates.sum()
    # Times on a grid that is even in their logarithm, from where no clock has rung to where all
    # have: there the trapezoid rule is exact to rounding.
    last = (40 / rates[rates > 0].min()).log().item()
    grid = torch.arange(-40.0, last, 0.05, dtype=torch.float64).exp()
    rung = -torch.expm1(-rates[:, None] * grid)  # n_experts by times
    visits = torch.empty_like(rates)
    for i, rate in enumerate(rates):
        # Chances that 0, 1, ..., k - 1 of the other clocks have rung.
        chances = torch.zeros(k, len(grid), dtype=torch.float64)
        chances[0] = 1
        for j in (j for j in range(len(rates)) if j != i):
            moved = chances * rung[j]
            chances -= moved
            chances[1:] += moved[:-1]
        visits[i] = (chances.sum(0) * rate * grid * (-rate * grid).exp()).sum() * 0.05
    return visits / visits.sum()


def _shares(
    name: str, given: Sequence[float] | Tensor, n_experts: int | None
) -> Float[Tensor, " n_experts"]:
    values = torch.as_tensor(given, dtype=torch.float64).cpu()
    if values.ndim != 1 or len(values) != (n_experts or len(values)):
        raise ValueError(f"{name} has shape {list(values.shape)}, not [n_experts={n_experts}]")
    if not (torch.isfinite(values).all() and (values >= 0).all() and values.sum() > 0):
        raise ValueError(f"{name}={values.tolist()} must be numbers of 0 or more, one above 0")
    return values
