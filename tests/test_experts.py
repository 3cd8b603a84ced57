from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from moe_ref import Experts, specification
from moe_ref.experts import BACKENDS
from moe_ref.ffn import ACTIVATIONS

from .tools import assert_close, gradients


def naive(rows, counts, experts):
    """Row by row through the block of the run it lies in."""
    up, down = experts.input_weight, experts.down
    owners = [e for e, n in enumerate(counts.tolist()) for _ in range(n)]
    outputs = [
        specification.feed_forward(row, up[e], down[e], experts.activation)
        for e, row in zip(owners, rows, strict=True)
    ]
    return torch.stack(outputs) if outputs else rows * 0


def compare(experts, rows, counts):
    leaves = [rows, *experts.parameters()]
    ours, expected = experts(rows, counts), naive(rows, counts, experts)
    assert_close(ours, expected)
    for given_grad, expected_grad in zip(
        gradients(ours, *leaves), gradients(expected, *leaves), strict=True
    ):
        assert_close(given_grad, expected_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_outputs_and_gradients_are_those_of_the_specification(backend, activation, counts, seed):
    torch.manual_seed(seed)
    experts = Experts(len(counts), 8, 12, activation=activation, backend=backend)
    rows = torch.randn(sum(counts), 8, requires_grad=True)
    compare(experts, rows, torch.tensor(counts))


@pytest.mark.parametrize("d_ff", [12, 10])  # 10: outputs that don't fall into four blocks
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_and_many_give_what_linear_gives(d_ff, bias):
    torch.manual_seed(0)
    counts = torch.tensor([1, 2, 3, 15, 16, 63, 64, 65])
    experts = Experts(len(counts), 8, d_ff, activation="relu", bias=bias, backend="loop")
    rows = torch.randn(int(counts.sum()), 8, requires_grad=True)
    expected = []
    for e, run in enumerate(rows.split(counts.tolist())):
        hidden = F.linear(run, experts.up[e], experts.up_bias[e] if bias else None).relu()
        expected.append(F.linear(hidden, experts.down[e], experts.down_bias[e] if bias else None))
    leaves = [rows, *experts.parameters()]
    ours = experts(rows, counts)
    assert_close(ours, torch.cat(expected))
    for mine, theirs in zip(
        gradients(ours, *leaves), gradients(torch.cat(expected), *leaves), strict=True
    ):
        assert_close(mine, theirs)
    with torch.no_grad():  # by other kernels
        assert_close(experts(rows, counts), ours)


def test_threads_that_multiply_at_the_same_time_get_the_same_bits():
    torch.manual_seed(0)
    experts = Experts(4, 64, 64, backend="loop").bfloat16().requires_grad_(False)
    rows, counts = torch.randn(4, 64, dtype=torch.bfloat16), torch.ones(4, dtype=torch.long)
    expected = experts(rows, counts)
    assert_close(expected, naive(rows.float(), counts, experts.float()), relative=0.03)
    experts = experts.bfloat16()

    @torch.no_grad()  # a thread has its own grad mode
    def multiply(_):
        return experts(rows, counts)

    expected = multiply(0)
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(multiply, range(200)))
    assert all(torch.equal(output, expected) for output in outputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", [[0, 5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
def test_idle_experts_get_a_gradient_of_exactly_zero(backend, counts):
    experts = Experts(4, 8, 12, bias=True, backend=backend)
    rows = torch.randn(sum(counts), 8)
    (experts(rows, torch.tensor(counts)) ** 2).sum().backward()
    for parameter in experts.parameters():
        for e, n in enumerate(counts):
            assert parameter.grad[e].isfinite().all()
            assert parameter.grad[e].any() == (n > 0)


def test_frozen_experts_cost_no_gradient_of_their_weights():
    experts = Experts(4, 32, 64, backend="loop").requires_grad_(False)
    rows = torch.randn(6, 32, requires_grad=True)
    y = experts(rows, torch.tensor([3, 0, 2, 1]))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        y.sum().backward()
    largest = max(event.nbytes() for event in seen.profiler.kineto_results.events())
    assert rows.grad is not None
    assert largest < experts.down.nbytes


@pytest.mark.parametrize("bias", [False, True])
def test_the_loop_can_be_differentiated_twice(bias):
    torch.manual_seed(0)
    experts = Experts(3, 2, 2, activation="silu", bias=bias, backend="loop").double()
    names = [name for name, _ in experts.named_parameters()]

    def outputs(rows, *weights):
        named = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(experts, named, (rows, torch.tensor([2, 0, 1])))

    leaves = [torch.randn(3, 2, dtype=torch.float64), *experts.parameters()]
    assert torch.autograd.gradgradcheck(outputs, [x.detach().requires_grad_() for x in leaves])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_belongs_to_each_expert(backend):
    torch.manual_seed(0)
    experts = Experts(3, 8, 12, activation="relu", bias=True, backend=backend)
    rows, counts = torch.randn(6, 8), torch.tensor([2, 0, 4])
    for e, run in zip((0, 2), rows.split([2, 4]), strict=True):
        hidden = (run @ experts.up[e].T + experts.up_bias[e]).relu()
        expected = hidden @ experts.down[e].T + experts.down_bias[e]
        assert_close(experts(rows, counts).split([2, 4])[e // 2], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_within_their_rounding_of_float32(backend, dtype):
    torch.manual_seed(0)
    experts = Experts(3, 16, 24, backend=backend).to(dtype)
    rows, counts = torch.randn(9, 16).to(dtype), torch.tensor([4, 0, 5])
    ours = experts(rows, counts)
    assert ours.dtype == dtype
    expected = naive(rows.float(), counts, experts.float())
    assert_close(ours, expected, relative=4 * torch.finfo(dtype).eps)


def test_float64_goes_by_the_loop_and_is_exact_to_its_own_rounding():
    torch.manual_seed(0)
    experts = Experts(3, 8, 12).double()
    rows, counts = torch.randn(9, 8, dtype=torch.float64), torch.tensor([4, 0, 5])
    assert_close(experts(rows, counts), naive(rows, counts, experts), relative=1e-14)
    assert torch.autograd.gradcheck(
        lambda rows: experts(rows, counts), rows.requires_grad_(), atol=1e-9
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_rows_are_taken_as_they_are(backend):
    torch.manual_seed(0)
    experts = Experts(2, 8, 12, backend=backend)
    rows, counts = torch.randn(8, 5).T, torch.tensor([2, 3])
    assert_close(experts(rows, counts), naive(rows, counts, experts))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_the_lower_precision_on_every_backend(backend):
    torch.manual_seed(0)
    experts = Experts(2, 8, 16, bias=True, backend=backend)
    rows, counts = torch.randn(5, 8), torch.tensor([2, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = experts(rows, counts)
    assert ours.dtype == torch.bfloat16
    assert_close(ours, experts(rows, counts), relative=0.02)


def test_weights_have_the_layout_of_the_hugging_face_models():
    gated = dict(Experts(5, 8, 12, bias=True).named_parameters())
    assert {name: tuple(p.shape) for name, p in gated.items()} == {
        "gate_up": (5, 24, 8),
        "gate_up_bias": (5, 24),
        "down": (5, 8, 12),
        "down_bias": (5, 8),
    }
    plain = dict(Experts(5, 8, 12, activation="gelu").named_parameters())
    assert {name: tuple(p.shape) for name, p in plain.items()} == {
        "up": (5, 12, 8),
        "down": (5, 8, 12),
    }


def test_input_that_does_not_fit_is_refused_by_name():
    experts, counts = Experts(2, 8, 12), torch.tensor([1, 1])
    with pytest.raises(ValueError, match="rows have 9 features, not d_model=8"):
        experts(torch.randn(2, 9), counts)
    with pytest.raises(ValueError, match="counts sum to 2, but there are 3 rows"):
        experts(torch.randn(3, 8), counts)
    with pytest.raises(ValueError, match=r"rows are torch.float64, but the experts are torch.fl"):
        experts(torch.randn(2, 8, dtype=torch.float64), counts)
    with pytest.raises(ValueError, match="backend='fast' is none of auto, loop, padded, grouped"):
        Experts(2, 8, 12, backend="fast")
    with pytest.raises(ValueError, match="d_model=6, d_ff=12: use 'loop'"):
        Experts(2, 6, 12, backend="grouped")(torch.randn(2, 6), counts)
