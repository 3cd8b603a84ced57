"""Routers, capacity and balance as naive specifications: one token, one slot, one expert at a time.

Written from the papers and from the definitions of this project, for comparison with the library,
values and gradients (autograd differentiates the loops as they stand). A decision is a list of
slots for each token, a slot being the pair (expert, weight); nobody is expert `n_experts`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from moe_ref.specification import largest, softmax

from .tools import assert_close

Slot = tuple[int, Tensor]


@dataclass
class Decision:
    """What a router or a capacity rule decides; padding has no slots and no scores."""

    n_experts: int
    slots: list[list[Slot]]
    logits: list[Tensor]
    scores: list[Tensor]  # of real tokens; zeros at padding
    mask: list[bool]

    @property
    def demand(self) -> list[int]:
        flat = [expert for slots in self.slots for expert, _ in slots]
        return [flat.count(e) for e in range(self.n_experts)]

    @property
    def real(self) -> list[int]:
        return [t for t, real in enumerate(self.mask) if real]


def assert_decided(routing, decision: Decision, *, demand: list[int] | None = None) -> None:
    """Same experts in the same slots, same weights, logits, scores and demand."""
    assert len(routing.experts) == len(decision.slots)
    nobody = (decision.n_experts, torch.zeros(()))
    width = routing.experts.shape[1]
    full = [slots + [nobody] * (width - len(slots)) for slots in decision.slots]
    assert routing.experts.tolist() == [[expert for expert, _ in slots] for slots in full]
    assert routing.demand.tolist() == (decision.demand if demand is None else demand)
    assert routing.mask.tolist() == decision.mask
    for t in decision.real:
        assert_close(routing.weights[t], torch.stack([w for _, w in full[t]]))
        assert_close(routing.logits[t], decision.logits[t])
        assert_close(routing.scores[t], decision.scores[t])


def weight_gradients(routing, decision: Decision, leaves: Sequence[Tensor]):
    """Gradients of one weighted sum of all slot weights: of the routing, and of the decision."""
    torch.manual_seed(1)
    factors = torch.randn_like(routing.weights)
    ours = (routing.weights * factors).sum()
    theirs = sum(
        (
            factors[t, s] * weight
            for t, slots in enumerate(decision.slots)
            for s, (_, weight) in enumerate(slots)
        ),
        start=torch.zeros(()),
    )
    ours, theirs = (value + 0 * sum(leaf.sum() for leaf in leaves) for value in (ours, theirs))
    return torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)


# ------------------------------------------------------------------------------------ routers


def by_token(
    x: Tensor,
    weight: Tensor,
    choose: Callable[[int, Tensor, Tensor], list[Slot]],
    score: Callable[[Tensor], Tensor] = softmax,
    mask: Sequence[bool] | None = None,
) -> Decision:
    """`choose(token, scores, logits)` gives the slots of a real token."""
    mask = [True] * len(x) if mask is None else list(mask)
    decision = Decision(len(weight), [], [], [], mask)
    for t, real in enumerate(mask):
        logits = weight.float() @ x[t].float()
        scores = score(logits)
        decision.slots.append(choose(t, scores, logits) if real else [])
        decision.logits.append(logits)
        decision.scores.append(scores if real else torch.zeros_like(scores))
    return decision


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def top_k(
    x: Tensor,
    weight: Tensor,
    k: int,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    n_groups: int = 1,
    groups_kept: int = 1,
    bias: Tensor | None = None,
    mask: Sequence[bool] | None = None,
) -> Decision:
    """Shazeer 2017; with bias, groups, sigmoid and scale DeepSeek-V3 (2412.19437), section 2.1.2.

    A token may use the groups whose two best biased scores have the largest sum. The weights are
    the scores without bias.
    """
    size = len(weight) // n_groups

    def choose(t: int, scores: Tensor, logits: Tensor) -> list[Slot]:
        biased = scores.tolist() if bias is None else (scores + bias).tolist()
        groups = [list(range(g * size, (g + 1) * size)) for g in range(n_groups)]
        two_best = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in groups]
        if n_groups > 1:
            allowed = {e for g in largest(two_best, groups_kept) for e in groups[g]}
            biased = [b if e in allowed else -math.inf for e, b in enumerate(biased)]
        chosen = largest(biased, k)
        total = sum(scores[e] for e in chosen) if renormalize else 1.0
        return [(e, scores[e] / total * scale) for e in chosen]

    return by_token(x, weight, choose, softmax if score == "softmax" else sigmoid, mask)


def noisy_top_k(
    x: Tensor, weight: Tensor, noise_weight: Tensor, k: int, noise: Tensor | None = None
) -> Decision:
    """Shazeer 2017, equations 3 to 5, with this noise [tokens, n_experts] (None: evaluation)."""

    def choose(t: int, scores: Tensor, logits: Tensor) -> list[Slot]:
        sigma = torch.log(1 + torch.exp(noise_weight @ x[t]))
        noisy = logits if noise is None else logits + noise[t] * sigma
        chosen = largest(noisy.tolist(), k)
        return list(zip(chosen, softmax(torch.stack([noisy[e] for e in chosen]))))

    return by_token(x, weight, choose)


def switch(x: Tensor, weight: Tensor, mask: Sequence[bool] | None = None) -> Decision:
    """Fedus 2021, equation 2: the best expert, with its raw score."""

    def choose(t: int, scores: Tensor, logits: Tensor) -> list[Slot]:
        best = largest(scores.tolist(), 1)[0]
        return [(best, scores[best])]

    return by_token(x, weight, choose, mask=mask)


def gshard(
    x: Tensor,
    weight: Tensor,
    second_kept: Sequence[bool] | None = None,
    mask: Sequence[bool] | None = None,
) -> Decision:
    """Lepikhin 2020, algorithm 1, with the outcome of the draw for each token (None: all kept)."""

    def choose(t: int, scores: Tensor, logits: Tensor) -> list[Slot]:
        first, second = largest(scores.tolist(), 2)
        total = scores[first] + scores[second]
        slots = [(first, scores[first] / total), (second, scores[second] / total)]
        return slots if second_kept is None or second_kept[t] else slots[:1]

    return by_token(x, weight, choose, mask=mask)


def expert_choice(
    x: Tensor, weight: Tensor, k: float, mask: Sequence[bool] | None = None
) -> Decision:
    """Zhou 2022, section 3.2: every expert picks its ceil(T * k / E) best tokens."""
    decision = by_token(x, weight, lambda t, scores, logits: [], mask=mask)
    places = math.ceil(Fraction(str(k)) * len(decision.real) / decision.n_experts)
    for e in range(decision.n_experts):
        ranked = sorted(decision.real, key=lambda t: (-decision.scores[t][e].item(), t))
        for t in ranked[:places]:
            decision.slots[t].append((e, decision.scores[t][e]))
    for slots in decision.slots:
        slots.sort(key=lambda slot: (-slot[1].item(), slot[0]))
    return decision


# ----------------------------------------------------------------------------------- capacity


def queue(decision: Decision, priority: str) -> list[tuple[int, int]]:
    """All (token, slot) in the order in which they may take places."""
    slots = [(t, s) for t, row in enumerate(decision.slots) for s in range(len(row))]
    keys = {
        "choice": lambda slot: (slot[1], slot[0]),
        "position": lambda slot: slot,
        "score": lambda slot: (-decision.slots[slot[0]][slot[1]][1].item(), slot),
    }
    return sorted(slots, key=keys[priority])


def drop(decision: Decision, limit: int, priority: str) -> Decision:
    """Who comes to a full expert is served by nobody; the others keep their weights."""
    slots = [list(row) for row in decision.slots]
    served = [0] * (decision.n_experts + 1)
    for t, s in queue(decision, priority):
        expert, weight = slots[t][s]
        if expert == decision.n_experts or served[expert] == limit:
            slots[t][s] = (decision.n_experts, weight * 0)
        else:
            served[expert] += 1
    return replace(decision, slots=slots)


def reroute(decision: Decision, limit: int, priority: str) -> Decision:
    """Drop, then rounds: each homeless slot asks for the token's next best expert with room.

    All slots of a round ask before any is admitted, by the same priority as at first. The weight
    is the new expert's score, normalised as the old one was.
    """
    nobody = decision.n_experts
    result = drop(decision, limit, priority)
    order = queue(decision, priority)
    homeless = [(t, s) for t, s in order if result.slots[t][s][0] == nobody]
    homeless = [(t, s) for t, s in homeless if decision.slots[t][s][0] != nobody]
    while homeless:
        room = [limit - served for served in result.demand]
        wishes = {}
        for t, s in sorted(homeless):
            used = {e for e, _ in result.slots[t]} | {wishes[t, r] for u, r in wishes if u == t}
            free = [e for e in range(nobody) if room[e] > 0 and e not in used]
            if free:
                wishes[t, s] = max(free, key=lambda e: (decision.scores[t][e].item(), -e))
        homeless = []
        for t, s in order:
            if (t, s) not in wishes:
                continue
            expert = wishes[t, s]
            if room[expert]:
                room[expert] -= 1
                old, weight = decision.slots[t][s]
                scores = decision.scores[t]
                result.slots[t][s] = (expert, weight * scores[expert] / scores[old])
            else:
                homeless.append((t, s))
    return result


# ------------------------------------------------------------------------------------ balance


def squared_variation(values: Sequence[Tensor]) -> Tensor:
    """Unbiased variance over squared mean."""
    mean = sum(values) / len(values)
    if len(values) == 1 or mean == 0:
        return mean * 0
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1) / mean**2


def importance_loss(decision: Decision) -> Tensor:
    sums = [torch.zeros(()) for _ in range(decision.n_experts)]
    for slots in decision.slots:
        for expert, weight in slots:
            sums[expert] = sums[expert] + weight
    return squared_variation(sums)


def load_loss(logits: Tensor, noisy: Tensor, sigma: Tensor, k: int, mask: Sequence[bool]) -> Tensor:
    """Shazeer 2017, equations 8 to 10: chance of each expert if its own noise is drawn anew."""
    n_experts = logits.shape[1]
    load = [torch.zeros(()) for _ in range(n_experts)]
    for t in (t for t, real in enumerate(mask) if real):
        for i in range(n_experts):
            others = sorted((noisy[t, j] for j in range(n_experts) if j != i), reverse=True)
            if k <= len(others):
                z = (logits[t, i] - others[k - 1]) / sigma[t, i]
                load[i] = load[i] + 0.5 * (1 + torch.erf(z / math.sqrt(2)))
            else:
                load[i] = load[i] + 1  # as many places as experts: always chosen
    return squared_variation(load)


def switch_loss(decision: Decision) -> Tensor:
    """Fedus 2021, equations 4 to 6, with f the share of all assignments."""
    n_experts, demand = decision.n_experts, decision.demand
    mean = [torch.zeros(()) for _ in range(n_experts)]
    for t in decision.real:
        for i in range(n_experts):
            share = decision.scores[t][i] / sum(decision.scores[t])
            mean[i] = mean[i] + share / len(decision.real)
    asked = max(sum(demand), 1)
    return n_experts * sum(f / asked * p for f, p in zip(demand, mean, strict=True))


def z_loss(decision: Decision) -> Tensor:
    """ST-MoE, equation 5."""
    squares = [torch.log(torch.exp(decision.logits[t]).sum()) ** 2 for t in decision.real]
    return sum(squares, start=torch.zeros(())) / max(len(squares), 1)


def sequence_loss(decision: Decision, seq: int) -> Tensor:
    """DeepSeek-V3, equations 17 to 20: the loss of each sequence alone, then the mean of them."""
    losses = []
    for start in range(0, len(decision.mask), seq):
        part = slice(start, start + seq)
        alone = replace(
            decision,
            slots=decision.slots[part],
            logits=decision.logits[part],
            scores=decision.scores[part],
            mask=decision.mask[part],
        )
        if any(alone.mask):
            losses.append(switch_loss(alone))
    return sum(losses, start=torch.zeros(())) / max(len(losses), 1)


def updated_bias(bias: Sequence[float], demand: Sequence[int], rate: float) -> list[float]:
    """DeepSeek-V3: down for who was asked more than the mean, up for who was asked less."""
    mean = sum(demand) / len(demand)
    step = [rate if d < mean else -rate if d > mean else 0.0 for d in demand]
    return [b + s for b, s in zip(bias, step, strict=True)]
