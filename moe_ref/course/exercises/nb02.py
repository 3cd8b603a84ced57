"""Exercise checks of notebook 02: experts and a router."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...specification import moe, top_k
from .grading import Case, grade, normal, predict, tied


def top_k_routing(attempt: Callable) -> None:
    """Bug of 02: top_k_routing(logits, k, renormalize) -> (experts, weights) [tokens, k]."""

    def specification(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        slots = top_k(logits, torch.eye(logits.shape[1]), k, renormalize=renormalize).slots
        experts = torch.tensor([[expert for expert, _ in token] for token in slots])
        return experts, torch.stack([torch.stack([w for _, w in token]) for token in slots])

    def cases() -> Iterator[Case]:
        whole = "with renormalize the weights of a token sum to 1"
        share = "without renormalize a weight is its share of the softmax over all experts"
        for tokens, n_experts, k in [(1, 1, 1), (1, 3, 2), (2, 4, 1), (3, 4, 4), (4, 8, 3)]:
            for rule, renormalize in ((whole, True), (share, False)):
                logits = 2 * normal(tokens, n_experts)
                yield rule, {"logits": logits, "k": k, "renormalize": renormalize}
        for tokens, n_experts, k in [(1, 4, 2), (2, 6, 3), (2, 96, 8)]:
            logits = tied(tokens, n_experts)
            yield "ties go to the lower index", {"logits": logits, "k": k, "renormalize": True}

    def best_first(given: tuple[Tensor, Tensor], **_: Any) -> bool:
        return bool((given[1].diff(dim=-1) <= 1e-6).all())

    def paired(given: tuple[Tensor, Tensor], logits: Tensor, **_: Any) -> bool:
        experts = given[0].long().clamp(0, logits.shape[1] - 1)
        share = given[1] / logits.softmax(dim=-1).gather(-1, experts)
        return torch.allclose(share, share[:, :1].expand_as(share), rtol=1e-3)

    rules: dict[str, Callable[..., bool]] = {
        "a token's best expert comes first": best_first,
        "a weight is that of the expert at the same place": paired,
    }
    grade(attempt, specification, cases(), kind="bug", rules=rules)


def moe_forward(attempt: Callable) -> None:
    """Exercise of 02: moe_forward(x, router, gate_up, down, k) -> [tokens, d_model].

    Experts without tokens hold NaN: whoever multiplies by them shows it. The router's gradient is
    compared as well.
    """

    def specification(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, k: int) -> Tensor:
        return moe(x, top_k(x, router, k), gate_up, down)

    def cases() -> Iterator[Case]:
        sizes = [
            (1, 1, 1, 3, 1),
            (1, 2, 1, 4, 2),
            (2, 2, 2, 3, 2),
            (5, 4, 6, 8, 2),
            (7, 4, 6, 4, 4),
        ]
        for tokens, d_model, d_ff, n_experts, k in sizes:
            x, router = normal(tokens, d_model), normal(n_experts, d_model)
            gate_up = normal(n_experts, 2 * d_ff, d_model)
            down = normal(n_experts, d_model, d_ff)
            idle = [e for e, tokens in enumerate(top_k(x, router, k).demand) if not tokens]
            gate_up[idle] = down[idle] = torch.nan
            yield (
                "y is the sum of each chosen expert's answer times its renormalised weight",
                {"x": x, "router": router, "gate_up": gate_up, "down": down, "k": k},
            )

    def unlike(slots: Callable[[list], list], renormalize: bool = True) -> Callable[..., bool]:
        """A rule is broken if the answer is that of a decision with these slots instead."""

        def test(
            given: Tensor, x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, k: int
        ) -> bool:
            right = top_k(x, router, k, renormalize=renormalize)
            wrong = moe(x, replace(right, slots=list(map(slots, right.slots))), gate_up, down)
            return not torch.allclose(given, wrong, rtol=1e-4, atol=1e-6)

        return test

    rules = {
        "the weights of a token sum to 1": unlike(lambda slots: slots, renormalize=False),
        "an answer is multiplied by its weight": unlike(lambda slots: [(e, 1.0) for e, _ in slots]),
        "the answers of a token are added up": unlike(
            lambda slots: [max(slots, key=lambda slot: slot[0])]
        ),
    }
    grade(attempt, specification, cases(), gradients=("x", "router"), rules=rules)


def mixtral_8x22b(guess: tuple[float, float] | None) -> None:
    """Guess of 02: total and active parameters of Mixtral 8x22B, in billions."""

    def truth() -> list[float]:
        d_model, d_ff, layers, n_experts, k = 6144, 16384, 56, 8, 2
        heads, kv_heads, head_dim, vocabulary = 48, 8, 128, 32000
        attention = 2 * d_model * head_dim * (heads + kv_heads)
        dense = layers * (attention + 2 * d_model + n_experts * d_model)
        outside = 2 * vocabulary * d_model + d_model
        expert = layers * 3 * d_model * d_ff
        return [(dense + outside + visited * expert) / 1e9 for visited in (n_experts, k)]

    why = (
        "Eight copies of the experts, but one of attention, norms, routers and embeddings, which "
        "every token uses. The name multiplies those by eight as well."
    )
    predict(guess, truth, 1.5, why)
