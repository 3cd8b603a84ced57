"""Exercise checks of notebook 09: patches and images, places by score, who is left out."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .grading import Case, distinct, grade, predict, tied


def assemble(attempt: Callable) -> None:
    """Exercise of 09: assemble(patches [n, patches, size * size], height, width) -> images."""

    def specification(patches: Tensor, height: int, width: int) -> Tensor:
        images = torch.zeros(len(patches), height, width)
        size = math.isqrt(patches.shape[-1])
        for image, parts in zip(images, patches, strict=True):
            corners = [(i, j) for i in range(0, height, size) for j in range(0, width, size)]
            for (top, left), part in zip(corners, parts, strict=True):
                image[top : top + size, left : left + size] = part.view(size, size)
        return images

    def cases() -> Iterator[Case]:
        whole, column = "inside a patch, pixels run row by row", "patches run row by row"
        both = "each patch is a square of the image"
        for rule, n, height, width, size in [
            (whole, 1, 2, 2, 2),
            (column, 1, 2, 2, 1),
            (both, 1, 2, 4, 2),
            (both, 1, 4, 4, 2),
            (column, 2, 6, 4, 2),
            (both, 3, 6, 9, 3),
        ]:
            pixels = torch.arange(n * height * width).float()
            patches = pixels.view(n, -1, size * size)
            yield rule, {"patches": patches, "height": height, "width": width}

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

    def case(experts: Tensor, weights: Tensor, limit: int, n_experts: int) -> dict[str, Any]:
        return {"experts": experts, "weights": weights, "limit": limit, "n_experts": n_experts}

    def cases() -> Iterator[Case]:
        one = torch.zeros(4, 1, dtype=torch.long)
        rule = "the largest weight takes a place first"
        yield rule, case(one, torch.tensor([[0.25], [0.5], [1.0], [0.75]]), 2, 1)
        rule = "an expert's limit is its own: no other expert's slots count"
        yield rule, case(torch.tensor([[1], [1], [0]]), torch.tensor([[0.75], [0.5], [0.25]]), 1, 2)
        rule = "nobody (n_experts) stays nobody, and takes no place"
        yield rule, case(torch.tensor([[1], [0]]), torch.tensor([[0.0], [0.5]]), 1, 1)
        rule = "the answer is in the order of the slots, as experts was"
        for tokens, k, n_experts, limit in [(3, 1, 2, 1), (4, 2, 3, 2), (6, 3, 4, 2), (5, 3, 3, 1)]:
            yield (
                rule,
                case(distinct(tokens, k, n_experts), torch.rand(tokens, k), limit, n_experts),
            )
        rule = "ties take places in the order of the slots: it takes a stable sort"
        yield rule, case(one, torch.full((4, 1), 0.5), 2, 1)
        for tokens, k, n_experts, limit in [(96, 1, 1, 40), (64, 2, 2, 20), (200, 2, 4, 30)]:
            weights = 0.5 + tied(tokens, k) / 4
            yield rule, case(distinct(tokens, k, n_experts), weights, limit, n_experts)

    grade(attempt, specification, cases(), kind="bug")


def images_left_out(guess: Sequence[float] | None) -> None:
    """Exercise of 09: of 128 images, how many get no place, by position and by score."""

    def left_out(key: Tensor, wanted: Tensor) -> int:
        ranked = wanted[order := key.argsort(descending=True, stable=True)]
        ahead = torch.nn.functional.one_hot(ranked, 8).cumsum(dim=0)
        served = torch.empty_like(wanted, dtype=torch.bool)
        served[order] = ahead.gather(1, ranked[:, None])[:, 0] <= 128  # 0.5 * 128 * 16 / 8
        return int((~served.view(128, 16).any(dim=1)).sum())

    def truth() -> tuple[float, float]:
        position, counts = -torch.arange(128 * 16), torch.zeros(2)
        for _ in range(100):
            wanted = torch.randint(8, (128 * 16,))
            keys = position, torch.rand(len(wanted))
            counts += torch.tensor([left_out(key, wanted) for key in keys])
        by_position, by_score = (round(count, 1) for count in (counts / 100).tolist())
        return by_position, by_score

    predict(
        guess,
        truth,
        8,
        "By position each expert is full after about 64 images, the last of the eight a few later, "
        "and every image after that gets nothing. By score all 16 patches of an image must lose, "
        "at one chance in 2^16.",
    )
