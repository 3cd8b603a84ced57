"""Exercise checks of notebook 00: reading a routing."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .grading import Case, distinct, grade, normal, predict


def expert_counts(attempt: Callable) -> None:
    """Exercise of 00: expert_counts(experts [tokens, k], n_experts) -> tokens of each expert."""

    def specification(experts: Tensor, n_experts: int) -> Tensor:
        flat = experts.flatten().tolist()
        return torch.tensor([flat.count(e) for e in range(n_experts)])

    def cases() -> Iterator[Case]:
        one = {"experts": torch.tensor([[0, 2], [2, 1]]), "n_experts": 3}
        yield "every choice of a token counts as one token, the second like the first", one
        idle = {"experts": torch.zeros(3, 1, dtype=torch.long), "n_experts": 4}
        yield "an expert that nobody chose has a count too: 0", idle
        for tokens, k, n_experts in [(1, 1, 1), (1, 2, 3), (2, 1, 3), (4, 2, 4), (6, 3, 8)]:
            yield {"experts": distinct(tokens, k, n_experts), "n_experts": n_experts}

    grade(attempt, specification, cases())


def gate_weights(attempt: Callable) -> None:
    """Exercise of 00: gate_weights(logits [batch, seq, n_experts]) -> weights of that shape."""

    def specification(logits: Tensor) -> Tensor:
        shares = [token.exp() / token.exp().sum() for token in logits.flatten(0, 1)]
        return torch.stack(shares).view(logits.shape)

    def cases() -> Iterator[Case]:
        rule = "a token's weights are the softmax of its own logits"
        yield rule, {"logits": torch.tensor([[[0.0, 1.0]]])}
        for batch, seq, n_experts in [(1, 2, 2), (2, 1, 2), (2, 3, 4), (4, 4, 4)]:
            yield rule, {"logits": normal(batch, seq, n_experts)}

    def sums_to_one(given: Tensor, logits: Tensor) -> bool:
        return torch.allclose(given.sum(dim=-1), torch.ones(logits.shape[:-1]), atol=1e-5)

    rules = {"the weights of each token sum to 1 over the experts": sums_to_one}
    grade(attempt, specification, cases(), kind="bug", rules=rules)


def idle_experts(guess: float | None) -> None:
    """Exercise of 00: of 64 experts, how many get none of 64 tokens dealt out at random."""

    def truth() -> float:
        dealt = torch.randint(64, (4000, 64))  # 4,000 times
        return sum(64 - row.unique().numel() for row in dealt) / len(dealt)

    predict(
        guess,
        lambda: round(truth(), 1),
        3,
        "Each token misses a given expert with probability 63/64, and all 64 miss it with "
        "(63/64)^64 = 0.365. So more than a third stand idle, though nothing is unfair.",
    )
