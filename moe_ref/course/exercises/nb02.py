"""Exercise checks of notebook 02: experts and a router."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...specification import moe, top_k
from .grading import grade, normal


def top_k_routing(attempt: Callable) -> None:
    """Exercise of 02: top_k_routing(logits, k, renormalize) -> (experts, weights) [tokens, k]."""

    def specification(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        slots = top_k(logits, torch.eye(logits.shape[1]), k, renormalize=renormalize).slots
        experts = torch.tensor([[expert for expert, _ in token] for token in slots])
        return experts, torch.stack([torch.stack([w for _, w in token]) for token in slots])

    def cases() -> Iterator[dict[str, Any]]:
        for tokens, n_experts, k in [(1, 1, 1), (1, 3, 2), (2, 4, 1), (3, 4, 4), (4, 8, 3)]:
            for renormalize in (True, False):
                logits = 2 * normal(tokens, n_experts)
                yield {"logits": logits, "k": k, "renormalize": renormalize}
        tied = torch.tensor([[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
        yield {"logits": tied, "k": 2, "renormalize": True}
        yield {"logits": torch.zeros(2, 24), "k": 3, "renormalize": False}

    grade(attempt, specification, cases())


def moe_forward(attempt: Callable) -> None:
    """Exercise of 02: moe_forward(x, router, gate_up, down, k) -> [tokens, d_model]."""

    def specification(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, k: int) -> Tensor:
        return moe(x, top_k(x, router, k), gate_up, down)

    def cases() -> Iterator[dict[str, Any]]:
        sizes = [
            (1, 2, 1, 1, 1),
            (1, 1, 1, 3, 2),
            (2, 2, 2, 3, 2),
            (5, 4, 6, 8, 2),
            (7, 4, 6, 4, 4),
        ]
        for tokens, d_model, d_ff, n_experts, k in sizes:
            yield {
                "x": normal(tokens, d_model),
                "router": normal(n_experts, d_model),
                "gate_up": normal(n_experts, 2 * d_ff, d_model),
                "down": normal(n_experts, d_model, d_ff),
                "k": k,
            }

    grade(attempt, specification, cases())


def parameter_count(attempt: Callable) -> None:
    """Exercise of 02: parameter_count(d_model, d_ff, n_experts, k) -> (total, active per token)."""

    def specification(d_model: int, d_ff: int, n_experts: int, k: int) -> tuple[int, int]:
        router, expert = n_experts * d_model, 3 * d_model * d_ff
        return router + n_experts * expert, router + k * expert

    def cases() -> Iterator[dict[str, Any]]:
        for d_model, d_ff, n_experts, k in [(1, 1, 1, 1), (2, 3, 4, 1), (4096, 14336, 8, 2)]:
            yield {"d_model": d_model, "d_ff": d_ff, "n_experts": n_experts, "k": k}

    grade(attempt, specification, cases())
