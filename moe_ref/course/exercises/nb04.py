"""Exercise checks of notebook 04: dispatch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .grading import distinct, grade, normal, predict


def cost_of_moving(guess: float | None) -> None:
    """Exercise of 04: FLOPs of dispatch and combine for each FLOP of the experts."""
    why = (
        "The ratio is 2 T / (3 d_ff) = 2 * 8,192 / (3 * 768): narrow experts make the einsum worse."
    )
    predict(guess, _cost_of_moving, 0.3, why)


def _cost_of_moving() -> float:
    """Counted on tensors without data: 8,192 tokens in a layer of Qwen3-30B-A3B, evenly loaded."""
    tokens, n_experts, k, d_model, d_ff = 8192, 128, 8, 2048, 768
    places = k * tokens // n_experts
    with torch.device("meta"):
        x, ones = torch.empty(tokens, d_model), torch.empty(tokens, n_experts, places)
        gate_up = torch.empty(n_experts, d_model, 2 * d_ff)
        down = torch.empty(n_experts, d_ff, d_model)
    with FlopCounterMode(display=False) as moving:
        rows = torch.einsum("tec,td->ecd", ones, x)
        torch.einsum("tec,ecd->td", ones, rows)
    with FlopCounterMode(display=False) as computing:
        gate, _ = (rows @ gate_up).chunk(2, dim=-1)
        gate @ down
    return moving.get_total_flops() / computing.get_total_flops()


def permutation(attempt: Callable) -> None:
    """Exercise of 04: permutation(experts [tokens, k], n_experts) -> slot of each row [rows]."""

    def specification(experts: Tensor, n_experts: int) -> Tensor:
        owners, order = experts.flatten().tolist(), []
        for expert in range(n_experts):
            order += [slot for slot, owner in enumerate(owners) if owner == expert]
        return torch.tensor(order, dtype=torch.long)

    def served_once(given: Tensor, experts: Tensor, n_experts: int) -> bool:
        served = (experts.flatten() < n_experts).nonzero()[:, 0]
        return torch.equal(given.sort().values, served)

    def grouped(given: Tensor, experts: Tensor, n_experts: int) -> bool:
        return bool((experts.flatten()[given].diff() >= 0).all())

    def decisions() -> Iterator[tuple[Tensor, int]]:
        for tokens, k, n_experts in [(1, 1, 1), (2, 1, 2), (1, 2, 2), (3, 2, 3), (12, 3, 6)]:
            experts = distinct(tokens, k, n_experts)
            yield experts, n_experts
            yield experts.masked_fill(torch.rand(tokens, k) < 0.4, n_experts), n_experts
        yield torch.zeros(24, 1, dtype=torch.long), 2  # one takes all
        yield torch.full((2, 2), 3), 3  # nobody takes any
        yield distinct(200, 2, 4), 4  # 400 slots, about 100 of each expert

    def cases() -> Iterator[tuple[str, dict[str, Any]]]:
        rule = "within an expert, rows keep the order of their slots"
        for experts, n_experts in decisions():
            yield rule, {"experts": experts, "n_experts": n_experts}

    rules = {
        "every slot that an expert serves has one row, and no other slot has any": served_once,
        "the rows of an expert lie together, in the order of experts": grouped,
    }
    grade(attempt, specification, cases(), kind="bug", rules=rules)


def combine(attempt: Callable) -> None:
    """Exercise of 04: combine(rows [rows, d_model], order [rows], scores, experts)."""

    def specification(rows: Tensor, order: Tensor, scores: Tensor, experts: Tensor) -> Tensor:
        y = [torch.zeros(rows.shape[1]) for _ in experts]
        for row, slot in zip(rows, order.tolist(), strict=True):
            token, place = divmod(slot, experts.shape[1])
            y[token] = y[token] + scores[token, experts[token, place]] * row
        return torch.stack(y)

    def cases() -> Iterator[tuple[str, dict[str, Any]]]:
        for tokens, k, n_experts, d_model, dropped in [
            (1, 1, 2, 1, 0),
            (2, 1, 2, 1, 0),
            (1, 2, 2, 1, 0),
            (2, 2, 3, 1, 0),
            (2, 2, 2, 1, 1),
            (3, 1, 2, 2, 2),
            (9, 3, 6, 4, 7),
            (2, 2, 3, 1, 4),  # nobody serves anybody
        ]:
            slots = distinct(tokens, k, n_experts).flatten()
            slots[torch.randperm(len(slots))[:dropped]] = n_experts
            order = slots.argsort(stable=True)[: len(slots) - dropped]
            yield (
                "a row is weighted by its own token's score of the expert that made it",
                {
                    "rows": normal(len(order), d_model),
                    "order": order,
                    "scores": normal(tokens, n_experts).softmax(dim=-1),
                    "experts": slots.view(tokens, k),
                },
            )

    grade(attempt, specification, cases(), kind="bug", gradients=("rows", "scores"))
