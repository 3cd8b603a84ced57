import copy
import dataclasses

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from moe_ref import Experts, FeedForward, MoELayer, SwitchRouter, TopKRouter, specification
from moe_ref.experts import BACKENDS
from moe_ref.layer import Mix

from .tools import assert_close, gradients, make_layer, parameters, sizes

MIXES = {"sigmoid": specification.sigmoid_mix, "softmax": specification.softmax_mix}


def naive(layer, x, mask=None):
    """The layer by its specification, on the same parameters."""
    shared = None if layer.shared is None else tuple(layer.shared.parameters())
    router, experts = layer.router, layer.experts

    def mix(token):
        return MIXES[layer.mix.kind](token, *layer.mix.parameters())

    decision = specification.top_k(
        x,
        router.weight,
        router.k,
        renormalize=router.renormalize,
        mask=None if mask is None else mask.tolist(),
    )
    return specification.moe(
        x,
        decision,
        experts.input_weight,
        experts.down,
        activation=experts.activation,
        shared=shared,
        **({} if layer.mix is None else {"mix": mix}),
    )


def compare(layer, x, mask=None):
    leaves = [x, *layer.parameters()]
    ours, expected = layer(x, mask=mask)[0], naive(layer, x, mask)
    expected = expected + 0 * sum(leaf.sum() for leaf in leaves)  # also if nobody was served
    assert_close(ours, expected)
    for mine, theirs in zip(gradients(ours, *leaves), gradients(expected, *leaves), strict=True):
        assert_close(mine, theirs, floor=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    shape=sizes(),
    renormalize=st.booleans(),
    activation=st.sampled_from(["swiglu", "gelu"]),
    shared=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_outputs_and_all_gradients_are_those_of_the_specification(
    backend, shape, renormalize, activation, shared, padded, seed
):
    tokens, n_experts, k = shape
    layer = make_layer(
        n_experts,
        k,
        renormalize=renormalize,
        activation=activation,
        backend=backend,
        shared=shared,
        seed=seed,
    )
    x = torch.randn(tokens, 8, requires_grad=True)
    compare(layer, x, torch.rand(tokens) < 0.7 if padded else None)


@pytest.mark.parametrize("kind", MIXES)
@given(shape=sizes(), padded=st.booleans(), seed=st.integers(0, 99))
def test_a_mixed_in_shared_expert_is_that_of_the_specification(kind, shape, padded, seed):
    tokens, n_experts, k = shape
    layer = make_layer(n_experts, k, renormalize=False, shared=True, seed=seed)
    layer.mix = Mix(8, kind)
    for parameter in layer.mix.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(tokens, 8, requires_grad=True)
    mask = torch.rand(tokens) < 0.7 if padded else None
    compare(layer, x, mask)
    if padded:
        x = x.detach().masked_fill(~mask[:, None], torch.nan)
        assert layer(x, mask=mask)[0].isfinite().all()


def test_the_residual_layer_is_deepspeeds_formula():
    """coefficient = softmax(W x + b); y = expert's output * c_0 + dense block's * c_1."""
    torch.manual_seed(0)
    layer = MoELayer(
        SwitchRouter(8, 4),
        Experts(4, 8, 12, activation="relu"),
        shared=FeedForward(8, 12, activation="relu"),
        mix=Mix(8, "softmax"),
    )
    x = torch.randn(9, 8, requires_grad=True)
    scores = torch.softmax(x @ layer.router.weight.T, dim=-1)
    gate, chosen = scores.max(dim=-1)
    hidden = torch.einsum("td,tfd->tf", x, layer.experts.up[chosen]).relu()
    routed = torch.einsum("tf,tdf->td", hidden, layer.experts.down[chosen]) * gate[:, None]
    dense = (x @ layer.shared.up.weight.T).relu() @ layer.shared.down.weight.T
    shares = torch.softmax(x @ layer.mix.weight.T + layer.mix.bias, dim=-1)
    expected = routed * shares[:, 0:1] + dense * shares[:, 1:]
    assert_close(layer(x)[0], expected)
    leaves = [x, *layer.parameters()]
    for mine, theirs in zip(gradients(layer(x)[0], *leaves), gradients(expected, *leaves)):
        assert_close(mine, theirs, floor=0.1)


def test_a_mix_without_a_shared_block_or_of_an_unknown_kind_is_refused():
    layer = make_layer()
    with pytest.raises(ValueError, match="needs a shared block to mix"):
        MoELayer(layer.router, layer.experts, mix=Mix(8, "sigmoid"))
    with pytest.raises(ValueError, match="mix has d_model=6, but experts have d_model=8"):
        MoELayer(layer.router, layer.experts, shared=FeedForward(8, 12), mix=Mix(6, "softmax"))
    with pytest.raises(ValueError, match="kind='mean' is neither sigmoid nor softmax"):
        Mix(8, "mean")


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_token_to_one_expert_is_right_and_leaves_the_others_without_gradient(backend):
    layer = make_layer(5, 1, renormalize=False, backend=backend)
    torch.nn.init.zeros_(layer.router.weight)  # all scores tie: the lowest index takes everything
    x = torch.randn(7, 8, requires_grad=True)
    y, routing = layer(x)
    assert routing.counts.tolist() == [7, 0, 0, 0, 0]
    compare(layer, x)
    y.sum().backward()
    assert (layer.experts.gate_up.grad[1:] == 0).all()
    assert layer.experts.gate_up.grad[0].any()


@given(shape=sizes(), seed=st.integers(0, 99))
def test_permuting_tokens_permutes_outputs_and_routing(shape, seed):
    tokens, n_experts, k = shape
    layer = make_layer(n_experts, k, seed=seed)
    x = torch.randn(tokens, 8)
    order = torch.randperm(tokens)
    y, routing = layer(x)
    y_permuted, routing_permuted = layer(x[order])
    assert routing_permuted.experts.equal(routing.experts[order])
    assert_close(y_permuted, y[order])


@given(shape=sizes(), seed=st.integers(0, 99))
def test_a_token_gets_the_same_answer_whoever_shares_its_batch(shape, seed):
    tokens, n_experts, k = shape
    layer = make_layer(n_experts, k, seed=seed)
    x = torch.randn(tokens, 8)
    y, _ = layer(x)
    for t in range(tokens):
        assert_close(layer(x[t : t + 1])[0], y[t : t + 1], floor=0.01)


def test_backends_agree_on_outputs_and_gradients():
    layer = make_layer(6, 3, shared=True, backend="loop")
    other = copy.deepcopy(layer)
    other.experts.backend = "grouped"
    x = torch.randn(40, 8, requires_grad=True)
    ours, theirs = (m(x)[0] for m in (layer, other))
    assert_close(ours, theirs)
    for a, b in zip(
        gradients(ours, x, *parameters(layer)),
        gradients(theirs, x, *parameters(other)),
        strict=True,
    ):
        assert_close(a, b)


def test_leading_axes_and_mask_are_those_of_the_batch():
    layer = make_layer(shared=True)
    x = torch.randn(2, 5, 8)
    mask = torch.rand(2, 5) < 0.6
    y, routing = layer(x, mask=mask)
    assert y.shape == x.shape
    assert routing.experts.shape == (10, 2)
    assert_close(y[mask], layer(x[mask])[0])
    assert (y[~mask] == 0).all()


def test_padding_may_hold_nan_without_harm_to_outputs_or_gradients():
    layer = make_layer(shared=True)
    x = torch.randn(6, 8)
    x[4:] = float("nan")
    mask = torch.arange(6) < 4
    y, routing = layer(x, mask=mask)
    assert routing.demand.sum() == 8
    assert_close(y[:4], layer(x[:4])[0])
    for gradient in gradients(y, *layer.parameters()):
        assert gradient.isfinite().all()


def test_a_batch_of_nothing_but_padding_gives_zeros():
    layer = make_layer()
    y, routing = layer(torch.randn(3, 8), mask=torch.zeros(3, dtype=torch.bool))
    assert (y == 0).all()
    assert routing.demand.sum() == routing.counts.sum() == 0


def test_non_contiguous_input_is_taken_as_it_is():
    layer = make_layer()
    x = torch.randn(4, 8, 3).mT
    assert_close(layer(x)[0], layer(x.contiguous())[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_keeps_its_dtype_while_routing_stays_float32(backend):
    layer = make_layer(d_model=16, d_ff=24, backend=backend, shared=True)
    x = torch.randn(30, 16).bfloat16()
    half = copy.deepcopy(layer).bfloat16()
    y, routing = half(x)
    assert y.dtype == torch.bfloat16
    assert routing.weights.dtype == torch.float32
    assert_close(y, half.float()(x.float())[0], relative=0.02)


def test_float64_matches_its_specification_to_its_own_rounding():
    layer = make_layer().double()
    x = torch.randn(9, 8, dtype=torch.float64)
    y, _ = layer(x)
    assert y.dtype == torch.float64
    assert_close(y, naive(layer, x), relative=1e-13)


@pytest.mark.parametrize("backend", ["loop", "padded"])
def test_finite_differences_agree_with_every_gradient_of_a_float64_layer(backend):
    layer = make_layer(backend=backend, shared=True).double()
    names = [name for name, _ in layer.named_parameters()]

    def outputs(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))[0]

    leaves = [torch.randn(5, 8, dtype=torch.float64), *layer.parameters()]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(outputs, leaves, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_experts_in_bfloat16_and_routing_in_float32(backend):
    layer = make_layer(d_model=16, d_ff=24, backend=backend, shared=True)
    x = torch.randn(30, 16, requires_grad=True)
    plain, decided = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = layer(x)
    assert y.dtype == torch.bfloat16
    assert routing.experts.equal(decided.experts)
    assert routing.weights.equal(decided.weights)
    assert_close(y, plain, relative=0.02)
    for gradient in gradients(y, x, *layer.parameters()):
        assert gradient.dtype == torch.float32 and gradient.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_neither_output_nor_gradient(use_reentrant):
    layer = make_layer(shared=True)
    x = torch.randn(10, 8, requires_grad=True)
    plain = layer(x)[0]
    plain.square().sum().backward()
    expected = [x.grad, *(p.grad for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    again = checkpoint(lambda x: layer(x)[0], x, use_reentrant=use_reentrant)
    again.square().sum().backward()
    assert again.equal(plain)
    for gradient, wanted in zip(
        [x.grad, *(p.grad for p in layer.parameters())], expected, strict=True
    ):
        assert gradient.equal(wanted)


def test_state_dict_round_trip_gives_the_same_bits():
    layer, other = make_layer(shared=True, seed=0), make_layer(shared=True, seed=1)
    x = torch.randn(10, 8)
    assert not layer(x)[0].equal(other(x)[0])
    other.load_state_dict(layer.state_dict())
    assert layer(x)[0].equal(other(x)[0])


def test_the_tensors_of_the_caller_are_left_as_they_were():
    layer = make_layer(shared=True)
    x, mask = torch.randn(6, 8), torch.arange(6) < 4
    copies = x.clone(), mask.clone()
    layer(x, mask=mask)
    assert x.equal(copies[0]) and mask.equal(copies[1])


def test_a_capacity_rule_edits_the_routing_before_dispatch():
    def only_first_choices(routing):
        experts = routing.experts.clone()
        experts[:, 1:] = routing.n_experts
        return dataclasses.replace(routing, experts=experts)

    layer = make_layer()
    x = torch.randn(6, 8)
    free, _ = layer(x)
    layer.capacity = only_first_choices
    y, routing = layer(x)
    assert routing.counts.sum() == 6 and routing.demand.sum() == 12
    assert routing.dropped_fraction == 0.5
    assert not y.equal(free)


def test_router_and_experts_must_agree_on_the_number_of_experts():
    with pytest.raises(ValueError, match="n_experts=4, but experts have n_experts=5"):
        MoELayer(TopKRouter(8, 4, 2), Experts(5, 8, 12))


def test_input_that_does_not_fit_is_refused_by_name():
    layer = make_layer()
    with pytest.raises(ValueError, match="x has 9 features, not d_model=8"):
        layer(torch.randn(2, 9))
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="mask"):
        layer(torch.randn(2, 8), mask=torch.ones(3, dtype=torch.bool))


def test_shapes_are_checked_at_run_time_in_this_suite():
    with pytest.raises(jaxtyping.TypeCheckError):
        FeedForward(4, 8)(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(jaxtyping.TypeCheckError):
        make_layer().experts(torch.randn(2, 8), torch.tensor([1, 1, 0]).float())
