"""The naive specification of each piece: one token, one slot, one expert at a time, no cleverness.

It is written from the papers, and everything faster is compared with it: outputs and gradients
(autograd differentiates the loops as they stand). A decision is a list of slots for each token; a
slot is a pair (expert, weight), and expert `n_experts` is nobody.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

Slot = tuple[int, Tensor]


def gelu(z: Tensor) -> Tensor:
    """z times the probability that a standard normal number is below z."""
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def silu(z: Tensor) -> Tensor:
    """z times its sigmoid."""
    return z / (1 + torch.exp(-z))


def relu(z: Tensor) -> Tensor:
    """z where it is positive, else 0."""
    return torch.where(z > 0, z, torch.zeros_like(z))


def feed_forward(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str = "swiglu",
    up_bias: Tensor | float = 0.0,
    down_bias: Tensor | float = 0.0,
) -> Tensor:
    """One token [d_model] through one block (Shazeer 2020, 2002.05202).

    `up` is [d_ff, d_model]; of a gated block [2 * d_ff, d_model], the rows of the gate first.
    """
    hidden = up @ x + up_bias
    gate, value = hidden[: len(up) // 2], hidden[len(up) // 2 :]
    if activation in ("swiglu", "geglu"):
        hidden = (silu(gate) if activation == "swiglu" else gelu(gate)) * value
    elif activation == "clipped_swiglu":  # gpt-oss, 2508.10925
        gate, value = torch.clip(gate, max=7), torch.clip(value, -7, 7)
        hidden = gate * sigmoid(1.702 * gate) * (value + 1)
    else:
        hidden = {"relu": relu, "gelu": gelu, "silu": silu}[activation](hidden)
    return down @ hidden + down_bias


def softmax(logits: Tensor) -> Tensor:
    """exp of each logit over their sum; the largest is subtracted so that exp can't overflow."""
    powers = torch.exp(logits - logits.detach().max())
    return powers / powers.sum()


def sigmoid(z: Tensor) -> Tensor:
    """1 / (1 + e^-z)."""
    return 1 / (1 + torch.exp(-z))


def largest(scores: Sequence[float], k: int) -> list[int]:
    """Indices of the k largest scores, in descending order, ties to the lower index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


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
        """How many slots hold each expert."""
        flat = [expert for slots in self.slots for expert, _ in slots]
        return [flat.count(e) for e in range(self.n_experts)]

    @property
    def real(self) -> list[int]:
        """The tokens that are not padding."""
        return [t for t, real in enumerate(self.mask) if real]


def by_token(
    x: Tensor,
    weight: Tensor,
    choose: Callable[[int, Tensor, Tensor], list[Slot]],
    score: Callable[[Tensor], Tensor] = softmax,
    mask: Sequence[bool] | None = None,
    offset: Tensor | float = 0.0,
) -> Decision:
    """`choose(token, scores, logits)` gives the slots of a real token. In float32 at least.

    `offset` is added to the logits.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    mask = [True] * len(x) if mask is None else [bool(real) for real in mask]
    decision = Decision(len(weight), [], [], [], mask)
    for t, real in enumerate(mask):
        logits = weight.to(dtype) @ x[t].to(dtype) + offset
        scores = score(logits)
        decision.slots.append(choose(t, scores, logits) if real else [])
        decision.logits.append(logits)
        decision.scores.append(scores if real else torch.zeros_like(scores))
    return decision


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
    logit_bias: Tensor | float = 0.0,
    mask: Sequence[bool] | None = None,
) -> Decision:
    """Shazeer 2017; with bias, groups, sigmoid and scale DeepSeek-V3 (2412.19437), section 2.1.2.

    A token may use the groups whose two best biased scores have the largest sum. The weights are
    the scores without bias. The bias of the logits (gpt-oss) is in the scores.
    """
    size = len(weight) // n_groups

    def choose(t: int, scores: Tensor, logits: Tensor) -> list[Slot]:
        biased = scores.tolist() if bias is None else (scores + bias).tolist()
        groups = [list(range(g * size, (g + 1) * size)) for g in range(n_groups)]
        if n_groups > 1:
            two_best = [sum(sorted(biased[e] for e in group)[-2:]) for group in groups]
            allowed = {e for g in largest(two_best, groups_kept) for e in groups[g]}
            biased = [b if e in allowed else -math.inf for e, b in enumerate(biased)]
        chosen = largest(biased, k)
        total = sum(scores[e] for e in chosen) if renormalize else 1.0
        return [(e, scores[e] / total * scale) for e in chosen]

    return by_token(x, weight, choose, softmax if score == "softmax" else sigmoid, mask, logit_bias)


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
    return top_k(x, weight, 1, renormalize=False, mask=mask)


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
    """A slot that comes to a full expert gets nobody; the others keep their weights."""
    slots = [list(row) for row in decision.slots]
    served = [0] * (decision.n_experts + 1)
    for t, s in queue(decision, priority):
        expert, weight = slots[t][s]
        served[expert] += 1
        if expert == decision.n_experts or served[expert] > limit:
            slots[t][s] = (decision.n_experts, weight * 0)
    return replace(decision, slots=slots)


def reroute(decision: Decision, limit: int, priority: str) -> Decision:
    """Drop, then rounds: each unplaced slot asks for the token's next best expert with room.

    All slots of a round ask before any is admitted, by the same priority as at first. The weight
    is the new expert's score, normalised as the old one was.
    """
    nobody = decision.n_experts
    result = drop(decision, limit, priority)
    order = queue(decision, priority)
    unplaced = [
        (t, s) for t, s in order if result.slots[t][s][0] == nobody != decision.slots[t][s][0]
    ]
    while unplaced:
        room = [limit - served for served in result.demand]
        wishes: dict[tuple[int, int], int] = {}
        for t, s in sorted(unplaced):
            used = {e for e, _ in result.slots[t]} | {wishes[t, r] for u, r in wishes if u == t}
            free = [e for e in range(nobody) if room[e] > 0 and e not in used]
            if free:
                wishes[t, s] = max(free, key=lambda e: (decision.scores[t][e].item(), -e))
        unplaced = []
        for t, s in (slot for slot in order if slot in wishes):
            expert = wishes[t, s]
            if room[expert]:
                room[expert] -= 1
                old, weight = decision.slots[t][s]
                scores = decision.scores[t]
                result.slots[t][s] = (expert, weight * scores[expert] / scores[old])
            else:
                unplaced.append((t, s))
    return result


def moe(
    x: Tensor,
    decision: Decision,
    up: Tensor,
    down: Tensor,
    *,
    activation: str = "swiglu",
    biases: tuple[Tensor, Tensor] | None = None,
    shared: tuple[Tensor, Tensor] | None = None,
    mix: Callable[[Tensor], Sequence[Tensor | float]] = lambda x: (1.0, 1.0),
) -> Tensor:
    """Tokens [tokens, d_model] through a whole layer, one by one (Shazeer 2017, equation 1).

    `up`, `down` and `biases` hold those of every expert; `shared` is the (up, down) of a block that
    every real token visits, and `mix(x)` the factors of the routed and of the shared part.
    """
    outputs = []
    for t, slots in enumerate(decision.slots):
        y = torch.zeros_like(x[t])
        for e, weight in slots:
            if e < decision.n_experts:
                bias = (0.0, 0.0) if biases is None else (biases[0][e], biases[1][e])
                y = y + weight * feed_forward(x[t], up[e], down[e], activation, *bias)
        if shared is not None and decision.mask[t]:
            routed_factor, shared_factor = mix(x[t])
            y = routed_factor * y + shared_factor * feed_forward(x[t], *shared, activation)
        outputs.append(y)
    return torch.stack(outputs).to(x.dtype) if outputs else x * 0


def sigmoid_mix(x: Tensor, weight: Tensor) -> tuple[float, Tensor]:
    """The shared part times a gate of its own, Qwen2-MoE (2407.10671); weight [1, d_model]."""
    return 1.0, sigmoid(weight[0] @ x)


def softmax_mix(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Two shares that sum to 1, as in DeepSpeed-MoE (2201.05596), section 4.1.1; weight
    [2, d_model]."""
    routed, shared = softmax(weight @ x + bias)
    return routed, shared


def add_up(values: Iterable[Tensor]) -> Tensor:
    """The sum of these scalars, 0 if there are none."""
    return sum(values, start=torch.zeros(()))


def squared_variation(values: Sequence[Tensor]) -> Tensor:
    """Unbiased variance over squared mean."""
    mean = add_up(values) / len(values)
    if len(values) == 1 or not mean:
        return mean * 0
    return add_up((value - mean) ** 2 for value in values) / (len(values) - 1) / mean**2


def importance_loss(decision: Decision) -> Tensor:
    """Shazeer 2017, equations 6 and 7."""
    sums = [torch.zeros(()) for _ in range(decision.n_experts)]
    for expert, weight in (slot for slots in decision.slots for slot in slots):
        sums[expert] = sums[expert] + weight
    return squared_variation(sums)


def load_loss(logits: Tensor, noisy: Tensor, sigma: Tensor, k: int, mask: Sequence[bool]) -> Tensor:
    """Shazeer 2017, equations 8 to 10: chance of each expert if its own noise is drawn again."""
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
    total = max(sum(demand), 1)
    return n_experts * add_up(f / total * p for f, p in zip(demand, mean, strict=True))


def z_loss(decision: Decision) -> Tensor:
    """ST-MoE, equation 5."""
    squares = [torch.log(torch.exp(decision.logits[t]).sum()) ** 2 for t in decision.real]
    return add_up(squares) / max(len(squares), 1)


def sequence_loss(decision: Decision, seq: int) -> Tensor:
    """DeepSeek-V3, equations 17 to 20: the loss of each sequence alone, then the mean of them."""
    losses = []
    for start in range(0, len(decision.mask), seq):
        names, part = ("slots", "logits", "scores", "mask"), slice(start, start + seq)
        alone = replace(decision, **{name: getattr(decision, name)[part] for name in names})
        if any(alone.mask):
            losses.append(switch_loss(alone))
    return add_up(losses) / max(len(losses), 1)


def updated_bias(bias: Sequence[float], demand: Sequence[int], rate: float) -> list[float]:
    """DeepSeek-V3: down for an expert with more demand than the mean, up for one with less."""
    mean = sum(demand) / len(demand)
    return [b + rate * ((d < mean) - (d > mean)) for b, d in zip(bias, demand, strict=True)]
