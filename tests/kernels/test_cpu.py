"""Small products on a CPU give what plain ones give, whichever way they are taken."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_ref.kernels import cpu
from tests.tools import assert_close

ROWS = [0, 1, 2, 3, 4, 8, 9, 16, 63, 64]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("inputs", [512, 640])
@pytest.mark.parametrize("columns", [False, True])
def test_outputs_and_gradients_are_those_of_a_product_in_float64(n, inputs, columns, threads):
    torch.manual_seed(n)
    rows, layer = torch.randn(n, inputs), cpu.Linear(inputs, 516)
    rows = rows.T.contiguous().T if columns else rows
    rows.requires_grad_()
    exact, precise = rows.detach().double().requires_grad_(), nn.Linear(inputs, 516).double()
    precise.load_state_dict(layer.state_dict())
    weights = torch.randn(n, 516)
    y, expected = layer(rows), precise(exact)
    assert_close(y, expected)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(rows.grad, exact.grad)
    for ours, theirs in zip(layer.parameters(), precise.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, floor=1.0)


def test_blocks_are_for_few_rows_of_large_float32_weights_and_for_more_on_two_threads(threads):
    weight, some = torch.randn(516, 640), threads > 1
    expected = {0: True, 1: True, 3: True, 4: some, 63: some, 64: False}
    assert {n: cpu.pays(torch.randn(n, 640), weight) for n in expected} == expected
    assert cpu.pays(torch.randn(8, 512), torch.randn(516, 512))  # narrow rows
    rows = torch.randn(1, 640)
    assert not cpu.pays(rows, torch.randn(100, 640))
    assert not cpu.pays(rows, torch.randn(517, 640))
    assert not cpu.pays(rows.double(), weight.double())
    assert not cpu.pays(rows.bfloat16(), weight.bfloat16())
    assert cpu.pays(torch.randn(1, 256), torch.randn(9, 512, 256)[4])


def test_autocast_multiplies_in_its_own_dtype():
    layer, x = cpu.Linear(640, 516), torch.randn(2, 640)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16 and y.equal(F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("shape", [(640,), (0, 640), (2, 0, 640), (2, 3, 640), (1, 1, 1, 640)])
def test_any_axes_may_stand_before_the_features(shape):
    layer, x = cpu.Linear(640, 516), torch.randn(shape)
    assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
