"""Exercise checks of notebook 06: load balancing."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...specification import largest, softmax
from .grading import Case, grade, normal, predict, tied


def balance_loss(attempt: Callable) -> None:
    """Exercise of 06: balance_loss(logits [tokens, n_experts], k) -> E * sum of f_i P_i."""

    def specification(logits: Tensor, k: int) -> Tensor:
        tokens, n_experts = logits.shape
        scores = torch.stack([softmax(token) for token in logits])
        chosen = [e for token in logits.tolist() for e in largest(token, k)]
        shares = torch.tensor([chosen.count(e) / (tokens * k) for e in range(n_experts)])
        return n_experts * (shares * scores.mean(dim=0)).sum()

    def cases() -> Iterator[Case]:
        everybody = "P is the mean score of every expert, of those that no token chose too"
        yield everybody, {"logits": torch.tensor([[1.0, 0.0]]), "k": 1}
        yield everybody, {"logits": torch.tensor([[3.0, 1.0, 0.0]]).repeat(2, 1), "k": 1}
        share = "f_i is the share of all tokens * k assignments, so that f sums to 1"
        for tokens, n_experts, k in [(2, 3, 2), (3, 4, 4), (1, 1, 1), (9, 8, 2)]:
            yield share, {"logits": 2 * normal(tokens, n_experts), "k": k}
        ties = "of equal logits the lower expert is chosen"
        yield ties, {"logits": torch.tensor([[0.0, 1.0, 1.0, 1.0]]), "k": 2}
        yield ties, {"logits": tied(4, 96), "k": 2}

    grade(attempt, specification, cases(), kind="bug", gradients=("logits",))


def biased_top_k(attempt: Callable) -> None:
    """Exercise of 06: biased_top_k(scores, bias [n_experts], k) -> experts and weights."""

    def specification(scores: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        chosen = [largest(token.tolist(), k) for token in scores + bias]
        kept = torch.stack([token[experts] for token, experts in zip(scores, chosen, strict=True)])
        return torch.tensor(chosen), torch.stack([weights / weights.sum() for weights in kept])

    def cases() -> Iterator[Case]:
        scores = torch.tensor([[0.8, 0.4, 0.2]])
        alone = "the weights are the scores without the bias, divided by their sum"
        yield alone, {"scores": scores, "bias": torch.tensor([-0.3, 0.0, 0.1]), "k": 2}
        choice = "the experts are those of the largest score + bias, best first"
        yield choice, {"scores": scores, "bias": torch.tensor([-0.5, 0.0, 0.3]), "k": 2}
        for tokens, n_experts, k in [(1, 1, 1), (2, 4, 1), (3, 4, 4), (8, 8, 3)]:
            bias = 0.3 * normal(n_experts)
            yield alone, {"scores": normal(tokens, n_experts).sigmoid(), "bias": bias, "k": k}
        small, large = torch.tensor([[0.001, 0.002, 0.003]]), torch.full((3,), 50_000.0)
        lost = "a small score that has been added to a large bias is lost: use it as it was"
        yield lost, {"scores": small, "bias": large, "k": 2}
        ties = "of equal sums the lower expert is chosen"
        yield ties, {"scores": (tied(4, 96) + 1) / 4, "bias": torch.zeros(96), "k": 2}

    grade(attempt, specification, cases(), kind="bug", gradients=("scores",))


def idle_updates(guess: float | None) -> None:
    """Exercise of 06: updates of the bias, 0.01 each, until expert 3 of four is first chosen."""

    def truth() -> int:
        # In hundredths, which are whole numbers: two experts meet exactly.
        scores, bias, updates = [90, 60, 50, 20], [0, 0, 0, 0], 0
        while True:
            chosen = largest([s + b for s, b in zip(scores, bias, strict=True)], 2)
            if 3 in chosen:
                return updates
            bias = [b - 1 if e in chosen else b + 1 for e, b in enumerate(bias)]
            updates += 1

    why = (
        "After 5 updates experts 1 and 2 meet at 0.55, and from then on take turns there. Expert "
        "3 has to climb from 0.2 to 0.55; no other expert comes down to meet it earlier"
    )
    predict(guess, truth, tolerance=3, why=why)
