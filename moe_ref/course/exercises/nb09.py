"""Exercise checks of notebook 09: images as tokens, priority by score, one gate for each task."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...specification import softmax
from .grading import distinct, grade, normal


def patchify(attempt: Callable) -> None:
    """Exercise of 09: patchify(images [n, height, width], size) -> [n, patches, size * size]."""

    def specification(images: Tensor, size: int) -> Tensor:
        patches = []
        for image in images:
            for top in range(0, image.shape[0], size):
                for left in range(0, image.shape[1], size):
                    patches.append(image[top : top + size, left : left + size].flatten())
        return torch.stack(patches).view(len(images), -1, size * size)

    def cases() -> Iterator[dict[str, Any]]:
        for n, height, width, size in [(1, 2, 2, 1), (1, 2, 4, 2), (1, 4, 4, 2), (3, 4, 6, 2)]:
            pixels = torch.arange(n * height * width)
            yield {"images": pixels.view(n, height, width).float(), "size": size}

    grade(attempt, specification, cases())


def admit_by_score(attempt: Callable) -> None:
    """Exercise of 09: admit_by_score(experts [tokens, k], weights, limit, n_experts) -> experts."""

    def specification(experts: Tensor, weights: Tensor, limit: int, n_experts: int) -> Tensor:
        kept, room = torch.full_like(experts, n_experts), [limit] * n_experts
        slots = [(t, s) for t in range(len(experts)) for s in range(experts.shape[1])]
        for t, s in sorted(slots, key=lambda slot: -weights[slot].item()):  # ties keep their order
            e = int(experts[t, s])
            if e < n_experts and room[e] > 0:
                kept[t, s], room[e] = e, room[e] - 1
        return kept

    def cases() -> Iterator[dict[str, Any]]:
        for tokens, k, n_experts, limit in [(1, 1, 1, 1), (3, 1, 1, 1), (4, 1, 2, 1), (6, 2, 3, 2)]:
            sizes = {"limit": limit, "n_experts": n_experts}
            weights = torch.rand(tokens, k)
            yield {"experts": distinct(tokens, k, n_experts), "weights": weights, **sizes}
        tied = torch.zeros(3, 1, dtype=torch.long)
        yield {"experts": tied, "weights": torch.full((3, 1), 0.5), "limit": 2, "n_experts": 2}
        nobody = torch.tensor([[1], [0], [0]])  # 1 is nobody: a padded token
        weights = torch.tensor([[0.0], [0.25], [0.5]])
        yield {"experts": nobody, "weights": weights, "limit": 1, "n_experts": 1}

    grade(attempt, specification, cases())


def multi_gate(attempt: Callable) -> None:
    """Exercise of 09: multi_gate(x [n, d], answers [n, E, h], gates [tasks, E, d]) -> mixtures."""

    def specification(x: Tensor, answers: Tensor, gates: Tensor) -> Tensor:
        mixtures = torch.zeros(len(gates), len(x), answers.shape[2])
        for task, gate in enumerate(gates):
            for i, example in enumerate(x):
                for weight, answer in zip(softmax(gate @ example), answers[i], strict=True):
                    mixtures[task, i] += weight * answer
        return mixtures

    def cases() -> Iterator[dict[str, Any]]:
        for n, d, n_experts, h, tasks in [
            (1, 1, 1, 1, 1),
            (1, 1, 2, 1, 2),
            (2, 1, 2, 1, 2),
            (2, 2, 3, 2, 2),
            (3, 3, 4, 5, 3),
        ]:
            x, answers = normal(n, d), normal(n, n_experts, h)
            yield {"x": x, "answers": answers, "gates": normal(tasks, n_experts, d)}

    grade(attempt, specification, cases())
