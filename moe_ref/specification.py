"""The naive specification of each piece: one token and one expert at a time, no cleverness.

Written from the papers, so that a reader can see they are right. Everything faster is compared with
them, outputs and gradients (autograd differentiates them as they stand).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def gelu(z: Tensor) -> Tensor:
    """z times the probability that a standard normal number is below z."""
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def silu(z: Tensor) -> Tensor:
    """z times its sigmoid."""
    return z / (1 + torch.exp(-z))


def relu(z: Tensor) -> Tensor:
    """z where it is positive, else 0."""
    return torch.where(z > 0, z, torch.zeros_like(z))


def feed_forward(x: Tensor, into: Tensor, down: Tensor, activation: str = "swiglu") -> Tensor:
    """One token [d_model] through one block; `into` is gate_up or up (Shazeer 2020, 2002.05202)."""
    if activation in ("swiglu", "geglu"):
        d_ff = len(into) // 2
        gate, up = into[:d_ff] @ x, into[d_ff:] @ x
        hidden = (silu(gate) if activation == "swiglu" else gelu(gate)) * up
    else:
        hidden = {"relu": relu, "gelu": gelu, "silu": silu}[activation](into @ x)
    return down @ hidden


def softmax(logits: Tensor) -> Tensor:
    """exp of each logit over their sum; less the largest first, so that exp can't overflow."""
    powers = torch.exp(logits - logits.detach().max())
    return powers / powers.sum()


def largest(scores: Sequence[float], k: int) -> list[int]:
    """Indices of the k largest scores, in descending order, ties to the lower index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def route(x: Tensor, router: Tensor, k: int, renormalize: bool = True) -> list[tuple[int, Tensor]]:
    """The (expert, weight) pairs of one token [d_model] under a top-k softmax router."""
    scores = softmax(router.float() @ x.float())
    chosen = largest(scores.tolist(), k)
    total = sum(scores[e] for e in chosen) if renormalize else 1.0
    return [(e, scores[e] / total) for e in chosen]


def moe(
    x: Tensor,
    router: Tensor,
    into: Tensor,
    down: Tensor,
    *,
    k: int,
    renormalize: bool = True,
    activation: str = "swiglu",
    mask: Tensor | None = None,
    shared: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Tokens [tokens, d_model] through a whole layer, one by one (Shazeer 2017, equation 1)."""
    answers = []
    for t in range(len(x)):
        answer = torch.zeros_like(x[t])
        if mask is None or mask[t]:
            for e, weight in route(x[t], router, k, renormalize):
                answer = answer + weight * feed_forward(x[t], into[e], down[e], activation)
            if shared is not None:
                answer = answer + feed_forward(x[t], *shared, activation)
        answers.append(answer)
    return torch.stack(answers).to(x.dtype) if answers else x * 0
