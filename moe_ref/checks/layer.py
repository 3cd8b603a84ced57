"""Exercise checks of the first part of the course, the layer: notebooks 00 to 05."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .grading import distinct, grade, normal
from .specification import feed_forward, largest, moe, route, softmax


def load(attempt: Callable) -> None:
    """Exercise of 00: load(experts [tokens, k], n_experts) -> tokens at each expert [n_experts]."""

    def specification(experts: Tensor, n_experts: int) -> Tensor:
        flat = experts.flatten().tolist()
        return torch.tensor([flat.count(e) for e in range(n_experts)])

    def cases() -> Iterator[dict[str, Any]]:
        for tokens, k, n_experts in [(1, 1, 1), (1, 2, 3), (2, 1, 3), (4, 2, 4), (6, 3, 8)]:
            yield {"experts": distinct(tokens, k, n_experts), "n_experts": n_experts}
        yield {"experts": torch.zeros(3, 1, dtype=torch.long), "n_experts": 4}  # one takes all

    grade(attempt, specification, cases())


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
                logits = 2 * normal(tokens, n_experts)
                yield {"logits": logits, "k": k, "renormalize": renormalize}
        tied = torch.tensor([[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
        yield {"logits": tied, "k": 2, "renormalize": True}
        yield {"logits": torch.zeros(2, 24), "k": 3, "renormalize": False}

    grade(attempt, specification, cases())


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


def padding_waste(attempt: Callable) -> None:
    """Exercise of 04: padding_waste(counts [n_experts]) -> share of the padded rows left empty."""

    def specification(counts: Tensor) -> float:
        sizes = counts.tolist()
        cells = len(sizes) * max(sizes)
        return (cells - sum(sizes)) / cells if cells else 0.0

    def cases() -> Iterator[dict[str, Any]]:
        for sizes in ([1], [1, 1], [2, 0], [3, 1, 2], [0, 8, 0, 0], [0, 0], [5, 3, 9, 1, 0, 7]):
            yield {"counts": torch.tensor(sizes)}

    grade(attempt, specification, cases())


def permutation(attempt: Callable) -> None:
    """Exercise of 04: permutation(experts [tokens, k], n_experts) -> slot of each row [rows]."""

    def specification(experts: Tensor, n_experts: int) -> Tensor:
        owners, order = experts.flatten().tolist(), []
        for expert in range(n_experts):
            order += [slot for slot, owner in enumerate(owners) if owner == expert]
        return torch.tensor(order, dtype=torch.long)

    def cases() -> Iterator[dict[str, Any]]:
        for tokens, k, n_experts in [(1, 1, 1), (2, 1, 2), (1, 2, 2), (3, 2, 3), (12, 3, 6)]:
            experts = distinct(tokens, k, n_experts)
            yield {"experts": experts, "n_experts": n_experts}
            dropped = experts.masked_fill(torch.rand(tokens, k) < 0.4, n_experts)
            yield {"experts": dropped, "n_experts": n_experts}
        yield {"experts": torch.zeros(24, 1, dtype=torch.long), "n_experts": 2}  # one takes all
        yield {"experts": torch.full((2, 2), 3), "n_experts": 3}  # nobody takes any

    grade(attempt, specification, cases())


def combine(attempt: Callable) -> None:
    """Exercise of 04: combine(rows [rows, d_model], order [rows], weights [tokens, k])."""

    def specification(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros(len(weights), rows.shape[1])
        for row, slot in zip(rows, order.tolist(), strict=True):
            token, place = divmod(slot, weights.shape[1])
            y[token] += weights[token, place] * row
        return y

    def cases() -> Iterator[dict[str, Any]]:
        for tokens, k, d_model, dropped in [
            (1, 1, 1, 0),
            (2, 1, 1, 0),
            (1, 2, 1, 0),
            (2, 2, 1, 0),
            (2, 2, 1, 1),
            (3, 1, 2, 2),
            (9, 3, 4, 7),
            (2, 2, 1, 4),  # nobody serves anybody
        ]:
            order = torch.randperm(tokens * k)[dropped:]
            weights = torch.rand(tokens, k)
            yield {"rows": normal(len(order), d_model), "order": order, "weights": weights}

    grade(attempt, specification, cases())


def capacity_limit(attempt: Callable) -> None:
    """Exercise of 05: capacity_limit(factor, k, tokens, n_experts, minimum) -> places."""

    def specification(factor: float, k: int, tokens: int, n_experts: int, minimum: int) -> int:
        if math.isinf(factor):
            return tokens
        share = Fraction(str(factor)) * k * tokens / n_experts  # 1.1 counts as 11/10
        return min(tokens, max(minimum, math.ceil(share)))

    def cases() -> Iterator[dict[str, Any]]:
        for factor, k, tokens, n_experts, minimum in [
            (1.0, 1, 8, 8, 1),
            (1.0, 1, 5, 8, 0),
            (1.0, 2, 5, 4, 1),
            (1.25, 2, 100, 8, 4),
            (0.1, 1, 10, 8, 4),
            (1.0, 1, 2, 8, 4),
            (8.0, 2, 16, 8, 1),
            (1.1, 1, 100, 10, 1),
            (math.inf, 2, 6, 4, 1),
        ]:
            sizes = {"k": k, "tokens": tokens, "n_experts": n_experts}
            yield {"factor": factor, **sizes, "minimum": minimum}

    grade(attempt, specification, cases())


def drop_overflow(attempt: Callable) -> None:
    """Exercise of 05: drop_overflow(experts [tokens, k], limit, n_experts) -> experts."""

    def specification(experts: Tensor, limit: int, n_experts: int) -> Tensor:
        kept, room = torch.full_like(experts, n_experts), [limit] * n_experts
        for slot in range(experts.shape[1]):  # all first choices before any second
            for t, e in enumerate(experts[:, slot].tolist()):
                if e < n_experts and room[e] > 0:
                    kept[t, slot], room[e] = e, room[e] - 1
        return kept

    def cases() -> Iterator[dict[str, Any]]:
        tight = torch.tensor([[0, 1], [1, 0]])  # token 0's second choice is token 1's first
        yield {"experts": tight, "limit": 1, "n_experts": 2}
        for tokens, k, n_experts, limit in [(1, 1, 1, 1), (4, 1, 2, 1), (6, 2, 3, 3), (8, 4, 4, 5)]:
            experts = distinct(tokens, k, n_experts)
            yield {"experts": experts, "limit": limit, "n_experts": n_experts}
        padded = torch.tensor([[3, 3], [0, 1], [3, 3], [0, 1], [3, 3]])  # 3 is nobody
        yield {"experts": padded, "limit": 1, "n_experts": 3}

    grade(attempt, specification, cases())


def reroute(attempt: Callable) -> None:
    """Exercise of 05: reroute(scores [tokens, n_experts], k, limit) -> experts [tokens, k]."""

    def specification(scores: Tensor, k: int, limit: int) -> Tensor:
        tokens, nobody = scores.shape
        slots, room = [[nobody] * k for _ in range(tokens)], [limit] * nobody
        while True:
            asked = []  # (slot, token, expert)
            for t in range(tokens):
                ranked = largest(scores[t].tolist(), nobody)
                best = [e for e in ranked if room[e] > 0 and e not in slots[t]]
                empty = [slot for slot in range(k) if slots[t][slot] == nobody]
                asked += [(slot, t, e) for slot, e in zip(empty, best, strict=False)]
            if not asked:
                return torch.tensor(slots)
            for slot, t, e in sorted(asked):
                if room[e] > 0:
                    slots[t][slot], room[e] = e, room[e] - 1

    def cases() -> Iterator[dict[str, Any]]:
        # Nobody's third choice is heard before everybody's second.
        rounds = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.7, 0.2, 0.1], [0.6, 0.1, 0.3]])
        yield {"scores": torch.tensor([[0.7, 0.3], [0.6, 0.4]]), "k": 1, "limit": 1}
        yield {"scores": rounds, "k": 1, "limit": 1}
        yield {"scores": torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]]), "k": 2, "limit": 1}
        for tokens, n_experts, k, limit in [(1, 1, 1, 1), (4, 4, 2, 2), (4, 2, 2, 3), (6, 4, 3, 4)]:
            scores = normal(tokens, n_experts).softmax(dim=-1)
            yield {"scores": scores, "k": k, "limit": limit}
        yield {"scores": torch.full((5, 3), 1 / 3), "k": 2, "limit": 3}  # all tied

    grade(attempt, specification, cases())


def group_limited(attempt: Callable) -> None:
    """Exercise of 03: group_limited(ranked, k, n_groups, groups_kept) -> experts [tokens, k]."""

    def specification(ranked: Tensor, k: int, n_groups: int, groups_kept: int) -> Tensor:
        size, experts = ranked.shape[1] // n_groups, []
        for scores in ranked.tolist():
            groups = [scores[g * size : (g + 1) * size] for g in range(n_groups)]
            best = largest([sum(sorted(group)[-2:]) for group in groups], groups_kept)
            left = [e for e in range(len(scores)) if e // size in best]
            experts.append([left[i] for i in largest([scores[e] for e in left], k)])
        return torch.tensor(experts)

    def cases() -> Iterator[dict[str, Any]]:
        below_zero = torch.tensor([[-0.5, -0.25, -0.75, -1.0]])  # a biased score may be
        yield {"ranked": below_zero, "k": 2, "n_groups": 2, "groups_kept": 1}
        one_star = torch.tensor([[1.0, 0.0, 0.75, 0.5, 0.25, 0.5]])  # the best expert is ruled out
        yield {"ranked": one_star, "k": 2, "n_groups": 3, "groups_kept": 1}
        crowded = torch.tensor([[0.5, 0.5, 0.5, 0.75, 0.5, 0.0]])  # a third expert doesn't count
        yield {"ranked": crowded, "k": 1, "n_groups": 2, "groups_kept": 1}
        tied = {"ranked": torch.zeros(2, 8), "n_groups": 4}
        yield {**tied, "k": 3, "groups_kept": 2}
        yield {"ranked": torch.ones(1, 24), "k": 3, "n_groups": 12, "groups_kept": 4}
        for tokens, n_experts, k, n_groups, groups_kept in [
            (1, 1, 1, 1, 1),
            (2, 4, 2, 4, 2),
            (3, 4, 4, 2, 2),
            (5, 12, 3, 4, 2),
            (9, 16, 4, 4, 3),
        ]:
            sizes = {"k": k, "n_groups": n_groups, "groups_kept": groups_kept}
            yield {"ranked": normal(tokens, n_experts), **sizes}

    grade(attempt, specification, cases())


def expert_choice(attempt: Callable) -> None:
    """Exercise of 03: expert_choice(logits, k) -> weights [tokens, n_experts], 0 if not chosen."""

    def specification(logits: Tensor, k: float) -> Tensor:
        scores, weights = torch.stack([softmax(token) for token in logits]), logits * 0
        taken = min(len(logits), math.ceil(len(logits) * k / logits.shape[1]))
        for e in range(logits.shape[1]):
            for t in largest(scores[:, e].tolist(), taken):
                weights[t, e] = scores[t, e]
        return weights

    def cases() -> Iterator[dict[str, Any]]:
        for tokens, n_experts, k in [(1, 1, 1), (2, 2, 1), (3, 2, 1), (4, 3, 1.5), (7, 4, 2)]:
            yield {"logits": 2 * normal(tokens, n_experts), "k": k}
        yield {"logits": torch.zeros(3, 2), "k": 1}  # tied: the earlier tokens
        yield {"logits": normal(4, 3), "k": 3}  # everybody takes everybody

    grade(attempt, specification, cases())
