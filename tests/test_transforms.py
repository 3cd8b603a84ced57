"""torch.func, torch.export and the meta device: what works, and what is said not to."""

import pytest
import torch

from moe_ref import Capacity, Transformer, TransformerConfig
from moe_ref.experts import BACKENDS
from moe_ref.layer import TensorOnly

from .tools import assert_close, make_layer

# torch uses it itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
FORWARD_MODE = ["loop", "padded"]  # torch's grouped_mm has no forward mode


def functional(backend):
    """A layer's square sum as a function of its parameters and input, and these."""
    layer = make_layer(backend=backend, shared=True)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

    return layer, loss, parameters, torch.randn(5, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func_grad_is_what_backward_gives(backend):
    layer, loss, parameters, x = functional(backend)
    ours = torch.func.grad(loss)(parameters, x)
    layer(x)[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert_close(ours[name], parameter.grad, floor=0.1)


@pytest.mark.parametrize("backend", FORWARD_MODE)
def test_torch_func_jvp_is_the_gradient_along_the_direction(backend):
    _, loss, parameters, x = functional(backend)
    towards = {name: torch.randn_like(p) for name, p in parameters.items()}, torch.randn_like(x)
    _, ours = torch.func.jvp(loss, (parameters, x), towards)
    d_parameters, d_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    expected = (d_x * towards[1]).sum()
    expected += sum((d_parameters[name] * towards[0][name]).sum() for name in parameters)
    assert_close(ours, expected)


@pytest.mark.parametrize("backend", FORWARD_MODE)
def test_forward_over_reverse_gives_the_product_with_the_hessian(backend):
    _, loss, parameters, x = functional(backend)
    parameters = {name: p.double() for name, p in parameters.items()}
    x, v = x.double(), torch.randn(5, 8, dtype=torch.float64)
    gradient = torch.func.grad(lambda x: loss(parameters, x))
    _, ours = torch.func.jvp(gradient, (x,), (v,))
    expected = (gradient(x + 1e-6 * v) - gradient(x - 1e-6 * v)) / 2e-6
    assert_close(ours, expected, relative=1e-5)


def test_vmap_is_refused_by_torch_as_the_docstring_says():
    layer = make_layer()
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: layer(x)[0])(torch.randn(3, 5, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_come_out_of_the_meta_device(backend, dtype):
    layer = make_layer(backend=backend, shared=True, d_ff=16).to("meta", dtype)
    x = torch.empty(2, 5, 8, device="meta", dtype=dtype)
    y, routing = layer(x, mask=torch.ones(2, 5, dtype=torch.bool, device="meta"))
    assert y.shape == x.shape and y.is_meta and y.dtype == dtype
    assert routing.experts.shape == (10, 2)
    assert repr(routing) == "Routing(tokens=10, slots=2, n_experts=4, on meta)"


def test_a_whole_model_is_built_and_run_on_the_meta_device():
    with torch.device("meta"):
        model = Transformer(TransformerConfig(100, 32, 2, 4, 48, n_experts=8))
        logits = model(torch.zeros(2, 7, dtype=torch.long)).logits
    assert logits.shape == (2, 7, 100) and logits.is_meta


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_export_of_the_layer_as_a_tensor_gives_the_layer(backend):
    layer = TensorOnly(make_layer(backend=backend, shared=True, d_ff=16)).eval()
    exported = torch.export.export(layer, (torch.randn(6, 8),)).module()
    x = torch.randn(6, 8)  # other experts for other tokens
    assert_close(exported(x), layer(x))


def test_a_capacity_rule_can_not_be_exported_as_the_docstring_says():
    layer = make_layer()
    layer.capacity = Capacity(1.0)
    with pytest.raises(RuntimeError):
        torch.export.export(TensorOnly(layer), (torch.randn(6, 8),))
