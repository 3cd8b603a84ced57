"""Exercise checks of notebook 03: routing strategies."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...specification import largest, sigmoid, softmax
from .grading import Case, grade, normal, tied


def group_limited(attempt: Callable) -> None:
    """Exercise of 03: group_limited(logits, bias, k, n_groups, groups_kept) -> experts, weights."""

    def specification(
        logits: Tensor, bias: Tensor, k: int, n_groups: int, groups_kept: int
    ) -> tuple[Tensor, Tensor]:
        size, experts, weights = logits.shape[1] // n_groups, [], []
        for token in logits:
            scores = sigmoid(token)
            ranked = (scores + bias).tolist()
            groups = [ranked[g * size : (g + 1) * size] for g in range(n_groups)]
            best = largest([sum(sorted(group)[-2:]) for group in groups], groups_kept)
            left = [e for e in range(len(ranked)) if e // size in best]
            chosen = [left[i] for i in largest([ranked[e] for e in left], k)]
            experts.append(chosen)
            weights.append(scores[chosen] / scores[chosen].sum())
        return torch.tensor(experts), torch.stack(weights)

    def case(ranked: list[float], k: int, n_groups: int) -> dict[str, Any]:
        """A token whose scores are all 1/2 and whose biased scores are these; one group stays."""
        bias = torch.tensor(ranked) - 0.5
        sizes = {"k": k, "n_groups": n_groups, "groups_kept": 1}
        return {"logits": torch.zeros(1, len(ranked)), "bias": bias, **sizes}

    def cases() -> Iterator[Case]:
        rule = "a group is ranked by the sum of its two best biased scores"
        yield rule, case([1.0, 0.0, 0.75, 0.5, 0.25, 0.5], 2, 3)  # the best expert is ruled out
        yield rule, case([0.5, 0.5, 0.5, 0.75, 0.5, 0.0], 1, 2)  # a third expert doesn't count
        rule = "an expert whose group is ruled out stays out, even where biased scores are negative"
        yield rule, case([-0.5, -0.25, -0.75, -1.0], 2, 2)
        rule = "the weights are the scores without the bias, divided by their sum"
        bias = {"logits": normal(2, 4), "bias": torch.tensor([0.5, 0.0, -0.25, 0.25])}
        yield rule, {**bias, "k": 2, "n_groups": 1, "groups_kept": 1}
        rule = "ties go to the lower index, among groups and among experts"
        for n_groups in (4, 48):
            sizes = {"k": 3, "n_groups": n_groups, "groups_kept": 2 if n_groups == 4 else 4}
            yield rule, {"logits": torch.zeros(1, 96), "bias": torch.zeros(96), **sizes}
        rule = "the four steps hold together, on random numbers"
        for tokens, n_experts, k, n_groups, groups_kept in [
            (1, 1, 1, 1, 1),
            (2, 4, 2, 4, 2),
            (3, 4, 4, 2, 2),
            (5, 12, 3, 4, 2),
            (9, 16, 4, 4, 3),
        ]:
            sizes = {"k": k, "n_groups": n_groups, "groups_kept": groups_kept}
            yield rule, {"logits": normal(tokens, n_experts), "bias": normal(n_experts), **sizes}

    grade(attempt, specification, cases(), kind="bug")


def switch_layer(attempt: Callable) -> None:
    """Exercise of 03: switch_layer(x, W, maps, shake, training) -> y [tokens, d_model]."""

    def specification(x: Tensor, W: Tensor, maps: Tensor, shake: Tensor, training: bool) -> Tensor:
        answers = []
        for features, factors in zip(x, shake, strict=True):
            scores = softmax(W @ (features * factors if training else features))
            (expert,) = largest(scores.tolist(), 1)
            answers.append(scores[expert] * (maps[expert] @ features))
        return torch.stack(answers)

    def cases() -> Iterator[Case]:
        for tokens, n_experts, d_model in [(1, 2, 2), (3, 2, 2), (8, 4, 3), (20, 5, 4)]:
            tensors = {"x": normal(tokens, d_model), "W": normal(n_experts, d_model)}
            tensors |= {"maps": normal(n_experts, d_model, d_model)}
            tensors |= {"shake": 0.5 + torch.rand(tokens, d_model)}
            yield "in evaluation nothing is shaken", {**tensors, "training": False}
            rule = "in training the router sees x * shake, and the experts see x"
            yield rule, {**tensors, "training": True}

    grade(attempt, specification, cases(), kind="bug", gradients=("W", "maps"))


def expert_choice_padded(attempt: Callable) -> None:
    """Exercise of 03: expert_choice_padded(logits, k, mask) -> weights [tokens, n_experts]."""

    def specification(logits: Tensor, k: float, mask: Tensor) -> Tensor:
        weights = torch.zeros_like(logits)
        real = mask.nonzero()[:, 0].tolist()
        scores = {t: softmax(logits[t]) for t in real}
        for e in range(logits.shape[1]):
            column = [float(scores[t][e]) for t in real]
            for i in largest(column, math.ceil(len(real) * k / logits.shape[1])):
                weights[real[i], e] = scores[real[i]][e]
        return weights

    def case(logits: Tensor, k: float, padding: list[int], filled: float) -> dict[str, Any]:
        mask = torch.ones(len(logits), dtype=torch.bool)
        mask[padding] = False
        logits[padding] = filled
        return {"logits": logits, "k": k, "mask": mask}

    def cases() -> Iterator[Case]:
        rule = (
            "the softmax runs over the experts, and each expert takes the tokens it scores highest"
        )
        yield rule, case(normal(2, 2), 1, [], 0.0)
        yield rule, case(2 * normal(3, 2), 1, [], 0.0)
        rule = "each expert takes ceil(T k / E) tokens, rounded up"
        yield rule, case(2 * normal(4, 3), 1.5, [], 0.0)
        rule = "the weights are the scores as they are, and everybody may take everybody"
        yield rule, case(normal(4, 3), 3, [], 0.0)
        rule = "T counts real tokens only, so padding takes no places from them"
        yield rule, case(normal(6, 2), 1, [2, 4], 0.0)
        rule = "padding is never taken, however large its logits"
        yield rule, case(torch.cat([-normal(3, 2).abs(), normal(1, 2)]), 2, [0], 9.0)
        rule = "ties go to the earlier token"
        yield rule, case(torch.zeros(3, 2), 1, [], 0.0)
        yield rule, case(torch.zeros(200, 4), 1, [0, 7], 0.0)
        yield rule, case(tied(300, 3), 1, list(range(100, 150)), 1.0)
        rule = "padding may hold anything, even NaN"
        yield rule, case(normal(5, 3), 1, [1, 4], math.nan)
        yield rule, case(normal(3, 2), 1, [0, 1, 2], math.nan)  # nobody is real

    grade(attempt, specification, cases())
