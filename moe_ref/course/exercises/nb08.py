"""Exercise checks of notebook 08: accidental bits, experts renumbered, experts that are dead."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...specification import largest, softmax
from .grading import Case, distinct, grade, normal, predict, tied


def accidental_bits(guess: float | None) -> None:
    """Exercise of 08: 64 experts, 8 labels, 2,000 tokens, all at random: bits that one tells."""

    def bits(*labels: Tensor) -> float:
        _, counts = torch.stack(labels).unique(dim=1, return_counts=True)
        return float(torch.special.entr(counts / counts.sum()).sum()) / math.log(2)

    def truth() -> float:
        found = []
        for _ in range(20):
            a, b = torch.randint(64, (2000,)), torch.randint(8, (2000,))
            found.append(bits(a) + bits(b) - bits(a, b))
        return round(sum(found) / len(found), 2)

    predict(
        guess,
        truth,
        0.04,
        "There are 512 pairs and 2,000 tokens: about four for each, now one and now seven, and the "
        "formula takes this unevenness for knowledge. Miller: (64 - 1) (8 - 1) / (2 * 2000 ln 2).",
    )


def renumber(attempt: Callable) -> None:
    """Exercise of 08: renumber(experts [tokens, k], order [n_experts]) -> the new numbers."""

    def specification(experts: Tensor, order: Tensor) -> Tensor:
        old = order.tolist()
        rows = [[-1 if e < 0 else old.index(e) for e in token] for token in experts.tolist()]
        return torch.tensor(rows)

    def cases() -> Iterator[Case]:
        rule = "old expert e becomes the i with order[i] = e"
        yield rule, {"experts": torch.tensor([[2]]), "order": torch.tensor([1, 2, 0])}
        yield rule, {"experts": torch.tensor([[0, 1], [3, 0]]), "order": torch.tensor([2, 0, 3, 1])}
        rule = "a slot that nobody serves, -1, stays -1"
        yield rule, {"experts": torch.tensor([[-1, 1]]), "order": torch.tensor([0, 1, 2])}
        yield rule, {"experts": torch.tensor([[0, -1], [-1, -1]]), "order": torch.tensor([1, 2, 0])}
        rule = "both rules hold together, on random numbers"
        for tokens, k, n_experts in [(1, 1, 1), (5, 4, 4), (6, 2, 8), (9, 3, 16)]:
            experts = distinct(tokens, k, n_experts)
            empty = torch.rand(tokens, k) < 0.3
            order = torch.randperm(n_experts)
            yield rule, {"experts": experts.masked_fill(empty, -1), "order": order}

    grade(attempt, specification, cases(), kind="bug")


def route_around(attempt: Callable) -> None:
    """Exercise of 08: route_around(logits [tokens, n_experts], k, dead) -> experts, weights."""

    def specification(logits: Tensor, k: int, dead: Tensor) -> tuple[Tensor, Tensor]:
        n_experts = logits.shape[1]
        alive = [e for e in range(n_experts) if not dead[e]]
        experts = torch.full((len(logits), k), n_experts)
        weights = torch.zeros(len(logits), k)
        for t, token in enumerate(logits):
            chosen = [alive[i] for i in largest(token[alive].tolist(), min(k, len(alive)))]
            experts[t, : len(chosen)] = torch.tensor(chosen, dtype=torch.long)
            weights[t, : len(chosen)] = softmax(token[chosen]) if chosen else token[:0]
        return experts, weights

    def cases() -> Iterator[Case]:
        nobody_died = torch.zeros(3, dtype=torch.bool)
        rule = "without a dead expert it is the usual top k"
        yield rule, {"logits": normal(2, 3), "k": 2, "dead": nobody_died}
        rule = "the weights are the softmax over the logits of the chosen ones alone"
        yield rule, {"logits": normal(2, 3), "k": 1, "dead": nobody_died}
        rule = "a dead expert is never chosen, even if all other logits are below 0"
        logits = torch.tensor([[-1.0, 3.0, -2.0, -4.0]])
        yield rule, {"logits": logits, "k": 2, "dead": _dead(4, 1)}
        rule = "experts keep their numbers"
        yield rule, {"logits": torch.tensor([[0.0, 2.0, 1.0]]), "k": 1, "dead": _dead(3, 0)}
        yield rule, {"logits": normal(3, 6), "k": 2, "dead": _dead(6, 1, 4)}
        rule = "with fewer than k alive, slots left over hold n_experts, nobody, with weight 0"
        yield rule, {"logits": normal(2, 3), "k": 2, "dead": _dead(3, 0, 2)}
        rule = "if all are dead, every slot holds nobody, and its weight is 0, not NaN"
        yield rule, {"logits": normal(2, 2), "k": 1, "dead": _dead(2, 0, 1)}
        rule = "ties go to the lower index"
        yield rule, {"logits": torch.zeros(1, 96), "k": 3, "dead": _dead(96, 0, 2)}
        yield rule, {"logits": tied(4, 80), "k": 2, "dead": _dead(80, 1, 7)}
        rule = "all rules hold together, on random numbers"
        for tokens, n_experts, k, dead in [(1, 2, 2, 1), (5, 4, 4, 2), (6, 8, 3, 5)]:
            yield (
                rule,
                {"logits": normal(tokens, n_experts), "k": k, "dead": _dead(n_experts, dead)},
            )

    grade(attempt, specification, cases(), gradients=("logits",))


def _dead(n_experts: int, *experts: int) -> Tensor:
    """A mask that is True at these experts."""
    mask = torch.zeros(n_experts, dtype=torch.bool)
    mask[list(experts)] = True
    return mask
