"""Answers to the exercises of notebooks 00 to 05: the right one, and plausible wrong ones."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F


# ----------------------------------------------------------------------------- 00, load
def load(experts, n_experts):
    return torch.bincount(experts.flatten(), minlength=n_experts)


def load_without_idle_experts(experts, n_experts):
    return torch.bincount(experts.flatten())


def load_of_first_choices(experts, n_experts):
    return torch.bincount(experts[:, 0], minlength=n_experts)


def load_as_a_share(experts, n_experts):
    return load(experts, n_experts) / experts.numel()


# ----------------------------------------------------------------------------- 01, swiglu
def swiglu(x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.T


def swiglu_up_first(x, gate_up, down):
    up, gate = (x @ gate_up.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.T


def swiglu_with_gelu(x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (F.gelu(gate) * up) @ down.T


def swiglu_bent_twice(x, gate_up, down):
    gate, up = F.silu(x @ gate_up.T).chunk(2, dim=-1)
    return (gate * up) @ down.T


def swiglu_interleaved(x, gate_up, down):
    gate, up = x @ gate_up[::2].T, x @ gate_up[1::2].T
    return (F.silu(gate) * up) @ down.T


# --------------------------------------------------------------------------- 01, ffn_cost
def ffn_cost(d_model, d_ff, gated):
    parameters = (3 if gated else 2) * d_model * d_ff
    return parameters, 2 * parameters


def ffn_cost_without_additions(d_model, d_ff, gated):
    parameters = (3 if gated else 2) * d_model * d_ff
    return parameters, parameters


def ffn_cost_never_gated(d_model, d_ff, gated):
    return 2 * d_model * d_ff, 4 * d_model * d_ff


def ffn_cost_with_backward(d_model, d_ff, gated):
    parameters = (3 if gated else 2) * d_model * d_ff
    return parameters, 6 * parameters


# --------------------------------------------------------------------- 01, balance_tokens
def balance_tokens(flops_per_second, bytes_per_second, bytes_per_weight):
    return flops_per_second * bytes_per_weight / (2 * bytes_per_second)


def balance_tokens_without_additions(flops_per_second, bytes_per_second, bytes_per_weight):
    return flops_per_second * bytes_per_weight / bytes_per_second


def balance_tokens_of_bytes(flops_per_second, bytes_per_second, bytes_per_weight):
    return flops_per_second / (2 * bytes_per_second)


def balance_tokens_upside_down(flops_per_second, bytes_per_second, bytes_per_weight):
    return 2 * bytes_per_second / (flops_per_second * bytes_per_weight)


# ---------------------------------------------------------------------- 02, top_k_routing
def top_k_routing(logits, k, renormalize):
    ordered = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    experts, weights = ordered.indices[:, :k], ordered.values[:, :k]
    return experts, weights / weights.sum(dim=-1, keepdim=True) if renormalize else weights


def top_k_routing_with_ties_to_the_higher_index(logits, k, renormalize):
    experts, weights = top_k_routing(logits.flip(-1), k, renormalize)
    return logits.shape[1] - 1 - experts, weights


def top_k_routing_always_renormalized(logits, k, renormalize):
    return top_k_routing(logits, k, True)


def top_k_routing_in_order_of_index(logits, k, renormalize):
    experts, weights = top_k_routing(logits, k, renormalize)
    order = experts.argsort(dim=-1)
    return experts.gather(-1, order), weights.gather(-1, order)


# ------------------------------------------------------------------------ 02, moe_forward
def moe_forward(x, router, gate_up, down, k, renormalize=True):
    experts, weights = top_k_routing(x @ router.T, k, renormalize)
    y = torch.zeros_like(x)
    for e in range(len(router)):
        served, slot = (experts == e).nonzero(as_tuple=True)
        answers = swiglu(x[served], gate_up[e], down[e]) * weights[served, slot, None]
        y = y.index_add(0, served, answers)
    return y


def moe_forward_without_renormalizing(x, router, gate_up, down, k):
    return moe_forward(x, router, gate_up, down, k, renormalize=False)


def moe_forward_unweighted(x, router, gate_up, down, k):
    experts, _ = top_k_routing(x @ router.T, k, True)
    return torch.stack(
        [sum(swiglu(t, gate_up[e], down[e]) for e in es) for t, es in zip(x, experts, strict=True)]
    )


def moe_forward_keeping_the_last_answer(x, router, gate_up, down, k):
    experts, weights = top_k_routing(x @ router.T, k, True)
    y = torch.zeros_like(x)
    for e in range(len(router)):
        served, slot = (experts == e).nonzero(as_tuple=True)
        y[served] = swiglu(x[served], gate_up[e], down[e]) * weights[served, slot, None]
    return y


# -------------------------------------------------------------------- 02, parameter_count
def parameter_count(d_model, d_ff, n_experts, k):
    router, expert = n_experts * d_model, 3 * d_model * d_ff
    return router + n_experts * expert, router + k * expert


def parameter_count_without_router(d_model, d_ff, n_experts, k):
    return n_experts * 3 * d_model * d_ff, k * 3 * d_model * d_ff


def parameter_count_of_two_matrices(d_model, d_ff, n_experts, k):
    router = n_experts * d_model
    return router + n_experts * 2 * d_model * d_ff, router + k * 2 * d_model * d_ff


def parameter_count_of_an_active_share_of_all(d_model, d_ff, n_experts, k):
    total, _ = parameter_count(d_model, d_ff, n_experts, k)
    return total, total * k // n_experts


# ---------------------------------------------------------------------- 04, padding_waste
def padding_waste(counts):
    places = len(counts) * counts.max().item()
    return 1 - counts.sum().item() / places if places else 0.0


def padding_waste_over_rows(counts):
    return len(counts) * counts.max().item() / max(counts.sum().item(), 1) - 1


def padding_waste_of_busy_experts(counts):
    return padding_waste(counts[counts > 0])


def padding_waste_as_a_count(counts):
    return float(len(counts) * counts.max().item() - counts.sum().item())


# ------------------------------------------------------------------------ 04, permutation
def permutation(experts, n_experts):
    owners = experts.flatten()
    return owners.argsort(stable=True)[: (owners < n_experts).sum()]


def permutation_with_nobody_at_the_end(experts, n_experts):
    return experts.flatten().argsort(stable=True)


def permutation_of_tokens(experts, n_experts):
    return permutation(experts, n_experts) // experts.shape[1]


def permutation_by_slot_first(experts, n_experts):
    tokens, k = experts.shape
    order = permutation(experts.T, n_experts)
    return order % tokens * k + order // tokens


def permutation_backwards_within_an_expert(experts, n_experts):
    return experts.numel() - 1 - permutation(experts.flatten().flip(0)[:, None], n_experts)


# ---------------------------------------------------------------------------- 04, combine
def combine(rows, order, weights):
    answers = rows * weights.flatten()[order, None]
    return rows.new_zeros(len(weights), rows.shape[1]).index_add(
        0, order // weights.shape[1], answers
    )


def combine_unweighted(rows, order, weights):
    return combine(rows, order, torch.ones_like(weights))


def combine_with_weights_in_the_order_of_rows(rows, order, weights):
    inverse = torch.zeros(weights.numel(), dtype=torch.long)
    inverse[order] = torch.arange(len(order))
    return combine(rows, order, weights.flatten()[inverse].view(weights.shape))


def combine_keeping_the_last_answer(rows, order, weights):
    y = rows.new_zeros(len(weights), rows.shape[1])
    y[order // weights.shape[1]] = rows * weights.flatten()[order, None]
    return y


def combine_renormalizing_what_is_left(rows, order, weights):
    kept = torch.zeros(weights.numel()).index_fill(0, order, 1).view(weights.shape) * weights
    return combine(rows, order, weights / kept.sum(dim=1, keepdim=True).clamp(min=1e-9))


# ------------------------------------------------------------------- 05, capacity_limit
def capacity_limit(factor, k, tokens, n_experts, minimum):
    if math.isinf(factor):
        return tokens
    return min(tokens, max(minimum, math.ceil(round(factor * k * tokens / n_experts, 6))))


def capacity_limit_rounded_down(factor, k, tokens, n_experts, minimum):
    if math.isinf(factor):
        return tokens
    return min(tokens, max(minimum, int(factor * k * tokens / n_experts)))


def capacity_limit_without_k(factor, k, tokens, n_experts, minimum):
    return capacity_limit(factor, 1, tokens, n_experts, minimum)


def capacity_limit_of_binary_fractions(factor, k, tokens, n_experts, minimum):
    if math.isinf(factor):
        return tokens
    return min(tokens, max(minimum, math.ceil(factor * k * tokens / n_experts)))


def capacity_limit_above_the_tokens(factor, k, tokens, n_experts, minimum):
    return max(minimum, capacity_limit(factor, k, tokens, n_experts, 0))


# -------------------------------------------------------------------- 05, drop_overflow
def drop_overflow(experts, limit, n_experts):
    queue = experts.T.flatten()
    place = F.one_hot(queue, n_experts + 1).cumsum(dim=0).gather(1, queue[:, None])[:, 0]
    return queue.masked_fill(place > limit, n_experts).view(experts.T.shape).T


def drop_overflow_by_position(experts, limit, n_experts):
    return drop_overflow(experts.reshape(-1, 1), limit, n_experts).view(experts.shape)


def drop_overflow_one_too_many(experts, limit, n_experts):
    return drop_overflow(experts, limit + 1, n_experts)


def drop_overflow_of_each_slot(experts, limit, n_experts):
    columns = [drop_overflow(column[:, None], limit, n_experts) for column in experts.T]
    return torch.cat(columns, dim=1)


# -------------------------------------------------------------------------- 05, reroute
def reroute(scores, k, limit):
    tokens, n_experts = scores.shape
    experts, room = torch.full((tokens, k), n_experts), [limit] * n_experts
    ranked = scores.argsort(dim=1, descending=True, stable=True).tolist()
    while True:
        asked = {}
        for t, mine in enumerate(experts.tolist()):
            best = [e for e in ranked[t] if room[e] > 0 and e not in mine]
            empty = [slot for slot in range(k) if mine[slot] == n_experts]
            asked.update({(slot, t): e for slot, e in zip(empty, best, strict=False)})
        if not asked:
            return experts
        for (slot, t), e in sorted(asked.items()):
            if room[e] > 0:
                experts[t, slot], room[e] = e, room[e] - 1


def reroute_never(scores, k, limit):
    ranked = scores.argsort(dim=1, descending=True, stable=True)
    return drop_overflow(ranked[:, :k], limit, scores.shape[1])


def reroute_token_after_token(scores, k, limit):
    kept, room = reroute_never(scores, k, limit).tolist(), [limit] * scores.shape[1]
    for e in [e for mine in kept for e in mine]:
        if e < len(room):
            room[e] -= 1
    for t, mine in enumerate(kept):
        for slot, e in enumerate(mine):
            ranked = scores[t].argsort(descending=True, stable=True).tolist()
            free = [e for e in ranked if room[e] > 0 and e not in mine]
            if e == len(room) and free:
                mine[slot] = free[0]
                room[free[0]] -= 1
    return torch.tensor(kept)


def reroute_twice_to_one_expert(scores, k, limit):
    room, columns = [limit] * scores.shape[1], []
    for _ in range(k):
        column = []
        for row in scores.argsort(dim=1, descending=True, stable=True).tolist():
            column.append(next((e for e in row if room[e] > 0), scores.shape[1]))
            if column[-1] < len(room):
                room[column[-1]] -= 1
        columns.append(column)
    return torch.tensor(columns).T


# ---------------------------------------------------------------------- 03, group_limited
def group_limited(ranked, k, n_groups, groups_kept, best=2, ruled_out=-torch.inf):
    grouped = ranked.unflatten(-1, (n_groups, -1))
    group_score = grouped.sort(dim=-1, descending=True).values[..., :best].sum(dim=-1)
    order = group_score.sort(dim=-1, descending=True, stable=True).indices[:, :groups_kept]
    stays = torch.zeros_like(group_score).scatter(1, order, 1).bool()
    left = grouped.masked_fill(~stays[..., None], ruled_out).flatten(-2)
    return left.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def group_limited_with_zero_for_the_ruled_out(ranked, k, n_groups, groups_kept):
    return group_limited(ranked, k, n_groups, groups_kept, ruled_out=0.0)


def group_limited_by_the_best_of_a_group(ranked, k, n_groups, groups_kept):
    return group_limited(ranked, k, n_groups, groups_kept, best=1)


def group_limited_by_the_sum_of_a_group(ranked, k, n_groups, groups_kept):
    return group_limited(ranked, k, n_groups, groups_kept, best=ranked.shape[1])


def group_limited_without_groups(ranked, k, n_groups, groups_kept):
    return group_limited(ranked, k, 1, 1)


# ---------------------------------------------------------------------- 03, expert_choice
def expert_choice(logits, k, rounded=math.ceil):
    p = logits.softmax(dim=-1)
    order = p.sort(dim=0, descending=True, stable=True).indices
    taken = order[: rounded(len(p) * k / p.shape[1])]
    return p * torch.zeros_like(p).scatter(0, taken, 1)


def expert_choice_rounded_down(logits, k):
    return expert_choice(logits, k, rounded=math.floor)


def expert_choice_with_a_softmax_over_tokens(logits, k):
    return expert_choice(logits.T, k * len(logits) / logits.shape[1]).T


def expert_choice_with_ties_to_the_later_token(logits, k):
    return expert_choice(logits.flip(0), k).flip(0)


def expert_choice_renormalized(logits, k):
    weights = expert_choice(logits, k)
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20)


# exercise: (a right answer, plausible wrong ones)
ANSWERS: dict[str, tuple[Callable, list[Callable]]] = {
    "load": (load, [load_without_idle_experts, load_of_first_choices, load_as_a_share]),
    "swiglu": (
        swiglu,
        [swiglu_up_first, swiglu_with_gelu, swiglu_bent_twice, swiglu_interleaved],
    ),
    "ffn_cost": (
        ffn_cost,
        [ffn_cost_without_additions, ffn_cost_never_gated, ffn_cost_with_backward],
    ),
    "balance_tokens": (
        balance_tokens,
        [balance_tokens_without_additions, balance_tokens_of_bytes, balance_tokens_upside_down],
    ),
    "top_k_routing": (
        top_k_routing,
        [
            top_k_routing_with_ties_to_the_higher_index,
            top_k_routing_always_renormalized,
            top_k_routing_in_order_of_index,
        ],
    ),
    "moe_forward": (
        moe_forward,
        [
            moe_forward_without_renormalizing,
            moe_forward_unweighted,
            moe_forward_keeping_the_last_answer,
        ],
    ),
    "parameter_count": (
        parameter_count,
        [
            parameter_count_without_router,
            parameter_count_of_two_matrices,
            parameter_count_of_an_active_share_of_all,
        ],
    ),
    "padding_waste": (
        padding_waste,
        [padding_waste_over_rows, padding_waste_of_busy_experts, padding_waste_as_a_count],
    ),
    "permutation": (
        permutation,
        [
            permutation_with_nobody_at_the_end,
            permutation_of_tokens,
            permutation_by_slot_first,
            permutation_backwards_within_an_expert,
        ],
    ),
    "combine": (
        combine,
        [
            combine_unweighted,
            combine_with_weights_in_the_order_of_rows,
            combine_keeping_the_last_answer,
            combine_renormalizing_what_is_left,
        ],
    ),
    "capacity_limit": (
        capacity_limit,
        [
            capacity_limit_rounded_down,
            capacity_limit_without_k,
            capacity_limit_of_binary_fractions,
            capacity_limit_above_the_tokens,
        ],
    ),
    "drop_overflow": (
        drop_overflow,
        [drop_overflow_by_position, drop_overflow_one_too_many, drop_overflow_of_each_slot],
    ),
    "reroute": (
        reroute,
        [reroute_never, reroute_token_after_token, reroute_twice_to_one_expert],
    ),
    "group_limited": (
        group_limited,
        [
            group_limited_with_zero_for_the_ruled_out,
            group_limited_by_the_best_of_a_group,
            group_limited_by_the_sum_of_a_group,
            group_limited_without_groups,
        ],
    ),
    "expert_choice": (
        expert_choice,
        [
            expert_choice_rounded_down,
            expert_choice_with_a_softmax_over_tokens,
            expert_choice_with_ties_to_the_later_token,
            expert_choice_renormalized,
        ],
    ),
}
