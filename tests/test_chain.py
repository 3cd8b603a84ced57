"""Every dispatch and every backend through every hard case, against the specification.

Whoever adds one adds a line to `DISPATCHES` or `BACKENDS`; a case is a function in `CASES`.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moe_ref import Capacity, Experts, FeedForward, MoELayer, TopKRouter, dispatch, specification
from moe_ref.experts import BACKENDS as TABLE

from .tools import assert_close, gradients

# name: (a dispatch, the backend of the experts it is given)
DISPATCHES = {"sorted rows": dispatch.sorted_rows, "one-hot einsum": dispatch.one_hot_einsum}
BACKENDS = ["auto", *TABLE]
D_MODEL, D_FF = 8, 16
FLOAT64 = ["auto"] + [
    name
    for name, backend in TABLE.items()
    if backend.supports(torch.zeros(1, D_MODEL).double(), Experts(1, D_MODEL, D_FF))
]


@dataclass
class Case:
    """A layer's parts and its input; the defaults are an ordinary one."""

    x: Tensor
    k: int = 2
    n_experts: int = 5
    mask: Tensor | None = None
    capacity: Capacity | None = None
    activation: str = "swiglu"
    bias: bool = True
    shared: bool = False
    router: Callable[[Tensor], None] | None = None  # writes the router's weight


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, D_MODEL)


def only_the_first(weight: Tensor) -> None:
    """All scores tie: the lower index wins, for every token."""
    weight.zero_()


def never_the_last(weight: Tensor) -> None:
    """Every token prefers expert 1, then 3; the others are idle."""
    weight.zero_()
    weight[1, 0], weight[3, 0] = 2.0, 1.0


def positive_first_feature(x: Tensor) -> Tensor:
    return torch.cat([x[..., :1].abs() + 1, x[..., 1:]], dim=-1)


def padded_with_nan() -> Case:
    x, mask = batch(3, 6), torch.rand(3, 6) < 0.6
    return Case(x.masked_fill(~mask[..., None], math.nan), mask=mask, shared=True)


CASES: dict[str, Callable[[], Case]] = {
    "ordinary": lambda: Case(batch(2, 7)),
    "no tokens": lambda: Case(batch(0)),
    "one token": lambda: Case(batch(1)),
    "all to one": lambda: Case(batch(9), k=1, router=only_the_first),
    "idle experts": lambda: Case(positive_first_feature(batch(9)), router=never_the_last),
    "every expert chosen": lambda: Case(batch(6), k=5),
    "a single expert": lambda: Case(batch(6), k=1, n_experts=1),
    "ties": lambda: Case(batch(4).repeat(2, 1).round(), k=3, router=only_the_first),
    "many rows": lambda: Case(batch(200), n_experts=2),  # past the small products of a CPU
    "more experts than rows": lambda: Case(batch(3), n_experts=40),
    "dropped": lambda: Case(batch(12), capacity=Capacity(0.6)),
    "dropped by score": lambda: Case(batch(12), capacity=Capacity(0.5, priority="score")),
    "rerouted": lambda: Case(batch(12), capacity=Capacity(0.8, overflow="reroute")),
    "an infinite capacity": lambda: Case(batch(12), capacity=Capacity(math.inf)),
    "a mask, NaN behind it": padded_with_nan,
    "nothing but padding": lambda: Case(batch(4), mask=torch.zeros(4, dtype=torch.bool)),
    "non-contiguous": lambda: Case(torch.randn(D_MODEL, 9).T),
    "a shared expert": lambda: Case(batch(7), shared=True),
    "no gate, no bias": lambda: Case(batch(7), activation="relu", bias=False),
    "gelu with a gate": lambda: Case(batch(7), activation="geglu"),
}


def build(case: Case) -> MoELayer:
    router = TopKRouter(D_MODEL, case.n_experts, case.k)
    if case.router is not None:
        with torch.no_grad():
            case.router(router.weight)
    experts = Experts(
        case.n_experts, D_MODEL, D_FF, activation=case.activation, bias=case.bias, backend="loop"
    )
    shared = FeedForward(D_MODEL, D_FF, activation=case.activation) if case.shared else None
    return MoELayer(router, experts, capacity=case.capacity, shared=shared)


def specified(layer: MoELayer, x: Tensor, mask: Tensor | None) -> Tensor:
    """The layer by its specification, in float64, on the same parameters."""
    x = x.reshape(-1, D_MODEL)
    experts, rule = layer.experts, layer.capacity
    decision = specification.top_k(
        x, layer.router.weight, layer.router.k, mask=None if mask is None else mask.reshape(-1)
    )
    if rule is not None and not math.isinf(rule.factor):
        limit = rule.limit(len(decision.real), layer.router.k, experts.n_experts)
        edit = {"drop": specification.drop, "reroute": specification.reroute}[rule.overflow]
        decision = edit(decision, limit, rule.priority)
    return specification.moe(
        x,
        decision,
        experts.input_weight,
        experts.down,
        activation=experts.activation,
        biases=None if experts.down_bias is None else (experts.input_bias, experts.down_bias),
        shared=None if layer.shared is None else tuple(layer.shared.parameters()),
    )


def run(layer: MoELayer, x: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Output, and the gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    y, _ = layer(x, mask=mask)
    return [y.detach(), *gradients(y, x, *layer.parameters())]


def expected(case: Case) -> tuple[MoELayer, list[Tensor]]:
    """The layer of a case, and what the specification says of it in float64."""
    torch.manual_seed(0)
    layer = build(case).double()
    x = case.x.double().detach().requires_grad_()
    y = specified(layer, x, case.mask).reshape(x.shape)
    if not y.requires_grad:  # nobody was served
        y = y + 0 * sum(parameter.sum() for parameter in layer.parameters())
    return layer, [y.detach(), *gradients(y, x, *layer.parameters())]


def make(name: str) -> Case:
    torch.manual_seed(1)
    return CASES[name]()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", DISPATCHES)
def test_outputs_and_all_gradients_are_those_of_the_specification(way, backend, name):
    case = make(name)
    layer, wanted = expected(case)
    layer = layer.float()
    layer.dispatch, layer.experts.backend = DISPATCHES[way], backend
    for ours, theirs in zip(run(layer, case.x, case.mask), wanted, strict=True):
        assert_close(ours, theirs.nan_to_num(), floor=0.1)
    with torch.no_grad():  # by other kernels
        assert_close(layer(case.x, mask=case.mask)[0], wanted[0])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", FLOAT64)
@pytest.mark.parametrize("way", DISPATCHES)
def test_float64_is_exact_to_its_own_rounding(way, backend, name):
    case = make(name)
    layer, wanted = expected(case)
    layer.dispatch, layer.experts.backend = DISPATCHES[way], backend
    for ours, theirs in zip(run(layer, case.x.double(), case.mask), wanted, strict=True):
        assert ours.dtype == torch.float64
        assert_close(ours, theirs.nan_to_num(), relative=1e-13, floor=0.1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", DISPATCHES)
def test_bfloat16_stays_within_its_rounding(way, backend, name):
    """Compared with the specification on the rounded weights and input."""
    case = make(name)
    case.x = case.x.bfloat16().float()
    torch.manual_seed(0)
    layer = build(case).bfloat16().double()
    wanted = specified(layer, case.x.double(), case.mask).reshape(case.x.shape)
    layer = layer.bfloat16()
    layer.dispatch, layer.experts.backend = DISPATCHES[way], backend
    ours = run(layer, case.x.bfloat16(), case.mask)
    assert {tensor.dtype for tensor in ours} == {torch.bfloat16}
    assert all(gradient.isfinite().all() for gradient in ours[1:])
    assert_close(ours[0], wanted.detach(), relative=0.03)


def test_the_list_holds_every_dispatch_and_backend_of_the_library():
    public = {name for name, kind in vars(dispatch).items() if _is_dispatch(kind)}
    assert public <= {getattr(way, "__name__", "") for way in DISPATCHES.values()}
    assert set(BACKENDS) == {"auto", *TABLE}


def _is_dispatch(kind: object) -> bool:
    function = inspect.isfunction(kind)
    return function and list(inspect.signature(kind).parameters) == ["x", "routing", "experts"]
