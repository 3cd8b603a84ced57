"""The naive specification of each piece, and the exercise checks built on it.

The specifications are written from the papers, one token and one expert at a time, with no
cleverness, so that a reader can see they are right. Everything faster is compared with them,
outputs and gradients (autograd differentiates them as they stand).

An exercise check takes the reader's function, tries it on small cases first (ties, idle experts,
one token, every expert chosen), and prints a verdict or raises with the first case it gets wrong.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# ------------------------------------------------------------------------------ specifications


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


# ------------------------------------------------------------------------------ exercise checks


def load(attempt: Callable) -> None:
    """Exercise of 00: load(experts [tokens, k], n_experts) -> tokens at each expert [n_experts]."""

    def specification(experts: Tensor, n_experts: int) -> Tensor:
        flat = experts.flatten().tolist()
        return torch.tensor([flat.count(e) for e in range(n_experts)])

    def cases() -> Iterator[dict[str, Any]]:
        for tokens, k, n_experts in [(1, 1, 1), (1, 2, 3), (2, 1, 3), (4, 2, 4), (6, 3, 8)]:
            yield {"experts": _distinct(tokens, k, n_experts), "n_experts": n_experts}
        yield {"experts": torch.zeros(3, 1, dtype=torch.long), "n_experts": 4}  # one takes all

    _grade(attempt, specification, cases())


def swiglu(attempt: Callable) -> None:
    """Exercise of 01: swiglu(x [tokens, d_model], gate_up, down) -> [tokens, d_model]."""

    def specification(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return torch.stack([feed_forward(token, gate_up, down) for token in x])

    def cases() -> Iterator[dict[str, Any]]:
        for tokens, d_model, d_ff in [(1, 1, 1), (1, 2, 1), (2, 2, 3), (3, 4, 2), (5, 8, 16)]:
            into, down = _normal(d_ff * 2, d_model), _normal(d_model, d_ff)
            yield {"x": _normal(tokens, d_model), "gate_up": into, "down": down}

    _grade(attempt, specification, cases())


def ffn_cost(attempt: Callable) -> None:
    """Exercise of 01: ffn_cost(d_model, d_ff, gated) -> (parameters, FLOPs for one token)."""

    def specification(d_model: int, d_ff: int, gated: bool) -> tuple[int, int]:
        parameters = (3 if gated else 2) * d_model * d_ff
        return parameters, 2 * parameters  # one multiplication and one addition per weight

    def cases() -> Iterator[dict[str, Any]]:
        for d_model, d_ff in [(1, 1), (2, 3), (512, 2048), (4096, 14336)]:
            for gated in (False, True):
                yield {"d_model": d_model, "d_ff": d_ff, "gated": gated}

    _grade(attempt, specification, cases())


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

    _grade(attempt, specification, cases())


def top_k_routing(attempt: Callable) -> None:
    """Exercise of 02: top_k_routing(logits, k, renormalize) -> (experts, weights) [tokens, k]."""

    def specification(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        identity = torch.eye(logits.shape[1])
        pairs = [list(zip(*route(token, identity, k, renormalize))) for token in logits]
        experts = torch.tensor([chosen for chosen, _ in pairs])
        return experts, torch.stack([torch.stack(weights) for _, weights in pairs])

    def cases() -> Iterator[dict[str, Any]]:
        for tokens, n_experts, k in [(1, 1, 1), (1, 3, 2), (2, 4, 1), (3, 4, 4), (4, 8, 3)]:
            for renormalize in (True, False):
                logits = 2 * _normal(tokens, n_experts)
                yield {"logits": logits, "k": k, "renormalize": renormalize}
        tied = torch.tensor([[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
        yield {"logits": tied, "k": 2, "renormalize": True}
        yield {"logits": torch.zeros(2, 24), "k": 3, "renormalize": False}

    _grade(attempt, specification, cases())


def moe_forward(attempt: Callable) -> None:
    """Exercise of 02: moe_forward(x, router, gate_up, down, k) -> [tokens, d_model]."""

    def specification(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, k: int) -> Tensor:
        return moe(x, router, gate_up, down, k=k)

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
                "x": _normal(tokens, d_model),
                "router": _normal(n_experts, d_model),
                "gate_up": _normal(n_experts, 2 * d_ff, d_model),
                "down": _normal(n_experts, d_model, d_ff),
                "k": k,
            }

    _grade(attempt, specification, cases())


def parameter_count(attempt: Callable) -> None:
    """Exercise of 02: parameter_count(d_model, d_ff, n_experts, k) -> (total, active per token)."""

    def specification(d_model: int, d_ff: int, n_experts: int, k: int) -> tuple[int, int]:
        router, expert = n_experts * d_model, 3 * d_model * d_ff
        return router + n_experts * expert, router + k * expert

    def cases() -> Iterator[dict[str, Any]]:
        for d_model, d_ff, n_experts, k in [(1, 1, 1, 1), (2, 3, 4, 1), (4096, 14336, 8, 2)]:
            yield {"d_model": d_model, "d_ff": d_ff, "n_experts": n_experts, "k": k}

    _grade(attempt, specification, cases())


def _grade(attempt: Callable, specification: Callable, cases: Iterator[dict[str, Any]]) -> None:
    """Compare on every case, smallest first; raise an AssertionError that shows the first miss."""
    passed = 0
    # On the CPU whatever the lesson's device, and without touching the lesson's random numbers.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for case in cases:
            expected = specification(**case)
            try:
                given = attempt(**{name: _copy(value) for name, value in case.items()})
            except NotImplementedError:
                print(f"{attempt.__name__}: not attempted yet")
                return
            if not _agree(given, expected):
                raise AssertionError(_counterexample(attempt.__name__, case, given, expected))
            passed += 1
    print(f"{attempt.__name__}: passed ({passed} cases)")


def _agree(given: Any, expected: Any) -> bool:
    """Same structure and shape, integers equal, real numbers equal to float32 rounding."""
    if isinstance(expected, tuple):
        pair = isinstance(given, tuple | list) and len(given) == len(expected)
        return pair and all(_agree(g, e) for g, e in zip(given, expected, strict=True))
    if isinstance(expected, float):
        return isinstance(given, int | float) and math.isclose(given, expected, rel_tol=1e-6)
    if not isinstance(expected, Tensor):
        return bool(given == expected)
    if not isinstance(given, Tensor) or given.shape != expected.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(given.to(expected.dtype), expected)
    return torch.allclose(given.to(expected), expected, rtol=1e-4, atol=1e-6)


def _counterexample(name: str, case: dict[str, Any], given: Any, expected: Any) -> str:
    lines = [f"{name} differs from the specification on this input:"]
    lines += [f"  {argument} = {_show(value)}" for argument, value in case.items()]
    return "\n".join([*lines, f"expected {_show(expected)}", f"     got {_show(given)}"])


def _show(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_show(part) for part in value) + ")"
    if isinstance(value, Tensor):
        return f"{[round(number, 4) for number in value.flatten().tolist()]} {tuple(value.shape)}"
    return repr(value)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def _distinct(tokens: int, k: int, n_experts: int) -> Tensor:
    """k different experts for each token."""
    return torch.stack([torch.randperm(n_experts)[:k] for _ in range(tokens)])
