"""Exercise checks of notebook 01: the dense block."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...specification import feed_forward
from .grading import grade, normal


def swiglu(attempt: Callable) -> None:
    """Exercise of 01: swiglu(x [tokens, d_model], gate_up, down) -> [tokens, d_model]."""

    def specification(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return torch.stack([feed_forward(token, gate_up, down) for token in x])

    def cases() -> Iterator[dict[str, Any]]:
        for tokens, d_model, d_ff in [(1, 1, 1), (1, 2, 1), (2, 2, 3), (3, 4, 2), (5, 8, 16)]:
            into, down = normal(d_ff * 2, d_model), normal(d_model, d_ff)
            yield {"x": normal(tokens, d_model), "gate_up": into, "down": down}

    grade(attempt, specification, cases())


def ffn_cost(attempt: Callable) -> None:
    """Exercise of 01: ffn_cost(d_model, d_ff, gated) -> (parameters, FLOPs for one token)."""

    def specification(d_model: int, d_ff: int, gated: bool) -> tuple[int, int]:
        parameters = (3 if gated else 2) * d_model * d_ff
        return parameters, 2 * parameters  # one multiplication and one addition per weight

    def cases() -> Iterator[dict[str, Any]]:
        for d_model, d_ff in [(1, 1), (2, 3), (512, 2048), (4096, 14336)]:
            for gated in (False, True):
                yield {"d_model": d_model, "d_ff": d_ff, "gated": gated}

    grade(attempt, specification, cases())


def balance_tokens(attempt: Callable) -> None:
    """Exercise of 01: balance_tokens(flops_per_second, bytes_per_second, bytes_per_weight)."""

    def specification(
        flops_per_second: float, bytes_per_second: float, bytes_per_weight: float
    ) -> float:
        seconds_to_read = bytes_per_weight / bytes_per_second  # one weight, whatever the tokens
        seconds_per_token = 2 / flops_per_second  # one multiplication and one addition with it
        return seconds_to_read / seconds_per_token

    def cases() -> Iterator[dict[str, Any]]:
        for flops, bandwidth, size in [(8.0, 1.0, 1.0), (100e9, 20e9, 4.0), (989e12, 3.35e12, 2.0)]:
            yield {
                "flops_per_second": flops,
                "bytes_per_second": bandwidth,
                "bytes_per_weight": size,
            }

    grade(attempt, specification, cases())
