"""Exercise checks of notebook 08: shared bits, an expert ruled out, agreement of two routers."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...specification import largest, softmax
from .grading import distinct, grade, normal


def mutual_information(attempt: Callable) -> None:
    """Exercise of 08: mutual_information(a [n], b [n]) -> bits; the labels are whole numbers."""

    def specification(a: Tensor, b: Tensor) -> Tensor:
        first, second = a.tolist(), b.tolist()
        pairs, bits = list(zip(first, second, strict=True)), 0.0
        for x, y in set(pairs):
            both = pairs.count((x, y)) / len(pairs)
            by_chance = first.count(x) * second.count(y) / len(pairs) ** 2
            bits += both * math.log2(both / by_chance)
        return torch.tensor(bits)

    def cases() -> Iterator[dict[str, Any]]:
        yield {"a": torch.tensor([0]), "b": torch.tensor([0])}
        yield {"a": torch.tensor([0, 1]), "b": torch.tensor([1, 0])}
        yield {"a": torch.tensor([0, 0, 1, 1]), "b": torch.tensor([0, 1, 0, 1])}
        yield {"a": torch.tensor([0, 2, 2]), "b": torch.tensor([5, 0, 0])}  # some labels are idle
        yield {"a": torch.tensor([0, 1, 2, 3]), "b": torch.tensor([0, 0, 1, 1])}
        yield {"a": torch.randint(3, (20,)), "b": torch.randint(4, (20,))}

    grade(_a_number_will_do(attempt), specification, cases())


def route_without(attempt: Callable) -> None:
    """Exercise of 08: route_without(logits [tokens, n_experts], k, expert) -> experts, weights."""

    def specification(logits: Tensor, k: int, expert: int) -> tuple[Tensor, Tensor]:
        rows = []
        for token in logits:
            left = [e for e in range(len(token)) if e != expert]
            chosen = [left[i] for i in largest(token[left].tolist(), k)]
            rows.append((torch.tensor(chosen), softmax(token[chosen])))
        experts, weights = zip(*rows, strict=True)
        return torch.stack(experts), torch.stack(weights)

    def cases() -> Iterator[dict[str, Any]]:
        for tokens, n_experts, k, expert in [
            (1, 2, 1, 0),
            (1, 3, 2, 1),
            (4, 3, 1, 0),
            (5, 6, 3, 4),
        ]:
            yield {"logits": normal(tokens, n_experts), "k": k, "expert": expert}
        yield {"logits": torch.zeros(2, 4), "k": 2, "expert": 0}  # ties
        yield {"logits": torch.tensor([[-1.0, 3.0, -2.0, -2.0]]), "k": 2, "expert": 1}
        yield {"logits": normal(3, 5), "k": 4, "expert": 2}  # all that are left

    grade(attempt, specification, cases())


def agreement(attempt: Callable) -> None:
    """Exercise of 08: agreement(a [tokens], b [tokens], n_experts) -> share, 0 to 1."""

    def specification(a: Tensor, b: Tensor, n_experts: int) -> Tensor:
        best = 0
        for renamed in itertools.permutations(range(n_experts)):
            same = sum(renamed[x] == y for x, y in zip(a.tolist(), b.tolist(), strict=True))
            best = max(best, same)
        return torch.tensor(best / len(a))

    def cases() -> Iterator[dict[str, Any]]:
        yield {"a": torch.tensor([0]), "b": torch.tensor([1]), "n_experts": 2}
        yield {"a": torch.tensor([0, 1, 1]), "b": torch.tensor([0, 0, 0]), "n_experts": 2}
        # Whoever gives expert 0 its favourite leaves nothing for expert 1.
        greedy = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0, 0]])
        yield {"a": greedy[0], "b": greedy[1], "n_experts": 2}
        yield {"a": torch.tensor([0, 0, 1, 2]), "b": torch.tensor([2, 2, 2, 2]), "n_experts": 4}
        for tokens, n_experts in [(6, 3), (12, 4)]:
            pair = distinct(2, tokens, tokens) % n_experts
            yield {"a": pair[0], "b": pair[1], "n_experts": n_experts}

    grade(_a_number_will_do(attempt), specification, cases())


def _a_number_will_do(attempt: Callable) -> Callable:
    """An answer may be a tensor without axes or a plain number: both are graded as a tensor."""

    @functools.wraps(attempt)
    def answer(**case: Any) -> Any:
        given = attempt(**case)
        return torch.tensor(float(given)) if isinstance(given, int | float) else given

    return answer
