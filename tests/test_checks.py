"""Specifications against closed forms; each exercise check accepts what is right, and only that."""

import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F

from moe_ref import checks


# ----------------------------------------------------------------------------- specifications
def test_activations_are_those_of_their_definitions_at_known_points():
    one = torch.tensor(1.0)
    assert checks.gelu(one).item() == pytest.approx(0.8413447, abs=1e-6)  # the normal cdf at 1
    assert checks.silu(one).item() == pytest.approx(0.7310586, abs=1e-6)  # 1 / (1 + 1/e)
    assert checks.relu(torch.tensor([-1.0, 0.0, 2.0])).tolist() == [0, 0, 2]


def test_route_gives_the_worked_token_its_experts_and_weights():
    scores = torch.tensor([0.05, 0.61, 0.09, 0.25])
    pairs = checks.route(scores.log(), torch.eye(4), k=2)
    assert [expert for expert, _ in pairs] == [1, 3]
    assert [weight.item() for _, weight in pairs] == pytest.approx([0.61 / 0.86, 0.25 / 0.86])
    raw = checks.route(scores.log(), torch.eye(4), k=1, renormalize=False)
    assert [(expert, weight.item()) for expert, weight in raw] == [(1, pytest.approx(0.61))]


def test_largest_gives_ties_to_the_lower_index():
    assert checks.largest([1.0, 3.0, 3.0, 2.0, 3.0], 4) == [1, 2, 4, 3]


def test_a_layer_of_identical_experts_is_the_dense_block_whatever_the_router():
    torch.manual_seed(0)
    x, into, down = torch.randn(5, 4), torch.randn(6, 4), torch.randn(4, 3)
    y = checks.moe(x, torch.randn(7, 4), into.expand(7, 6, 4), down.expand(7, 4, 3), k=3)
    dense = torch.stack([checks.feed_forward(token, into, down) for token in x])
    torch.testing.assert_close(y, dense)


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
}
WRONG = [(name, answer) for name, (_, wrong) in ANSWERS.items() for answer in wrong]


@pytest.mark.parametrize("name", ANSWERS)
def test_right_answer_passes(name, capsys):
    getattr(checks, name)(ANSWERS[name][0])
    assert f"{ANSWERS[name][0].__name__}: passed (" in capsys.readouterr().out


@pytest.mark.parametrize("name", ANSWERS)
def test_stub_is_not_attempted(name, capsys):
    def stub(*args, **kwargs):
        raise NotImplementedError

    getattr(checks, name)(stub)
    assert capsys.readouterr().out == "stub: not attempted yet\n"


@pytest.mark.parametrize(("name", "answer"), WRONG, ids=lambda part: getattr(part, "__name__", ""))
def test_wrong_answer_is_rejected(name, answer):
    with pytest.raises(AssertionError) as caught:
        getattr(checks, name)(answer)
    message = str(caught.value)
    assert message.startswith(f"{answer.__name__} differs from the specification on this input:\n")
    assert "expected " in message and "got " in message
    assert len(message) < 600  # small enough to be read


@pytest.mark.parametrize("name", ANSWERS)
def test_no_answer_is_rejected(name):
    with pytest.raises(AssertionError, match="got None"):
        getattr(checks, name)(lambda *args, **kwargs: None)


def test_every_exercise_of_the_course_is_tested_here():
    asked = set()
    for path in Path(__file__).parents[1].glob("notebooks/*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if "exercise" in cell.metadata.get("tags", []):
                asked |= set(re.findall(r"^checks\.(\w+)\(", cell.source, re.MULTILINE))
    assert asked == set(ANSWERS)


def test_a_check_leaves_the_random_numbers_of_the_lesson_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    checks.swiglu(swiglu)
    assert torch.rand(3).equal(expected)


def test_a_check_shows_the_case_even_if_the_answer_writes_into_its_input():
    def careless(logits, k, renormalize):
        logits.zero_()
        return top_k_routing(logits, k, renormalize)

    with pytest.raises(AssertionError) as caught:
        checks.top_k_routing(careless)
    assert "logits = [0.0" not in str(caught.value)
