"""Weights in 8 and 4 bits, against loops over their numbers, closed forms and ordinary experts."""

import copy
import math
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import jvp
from torch.profiler import ProfilerActivity, profile

from moe_ref import (
    Experts,
    MoELayer,
    TopKRouter,
    Transformer,
    TransformerConfig,
    checkpoints,
    generation,
)
from moe_ref.course import corpora
from moe_ref.kernels import quantised as kernel
from moe_ref.kernels.quantised import QuantisedWeight
from moe_ref.quantise import (
    QuantisedExperts,
    QuantisedLinear,
    errors,
    nbytes,
    plan_of,
    quantise,
    quantise_model,
)

from .test_chain import DISPATCHES
from .tools import assert_close, gradients

MOE = TransformerConfig(50, 16, 2, 4, 12, n_kv_heads=2, n_experts=4, k=2)
COUNTS = torch.tensor([3, 0, 5, 1])


def make(n=4, d_model=40, d_ff=27, seed=0, **options):
    torch.manual_seed(seed)
    return Experts(n, d_model, d_ff, **options)


def batch(d_model=40, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(int(COUNTS.sum()), d_model, dtype=dtype)


def by_loops(matrix, bits, group):
    """What a matrix becomes: the definition, number by number."""
    most = 2 ** (bits - 1) - 1
    result = torch.zeros_like(matrix)
    for i, row in enumerate(matrix.numpy()):
        for start in range(0, len(row), group):
            numbers = row[start : start + group]
            s = np.float32(max(abs(w) for w in numbers)) / np.float32(most)
            for j, w in enumerate(numbers):
                q = round(float(w / s)) if s else 0
                assert abs(q) <= most
                result[i, start + j] = float(np.float32(q) * s)
    return result


def specified(experts, rows, counts, bits, group):
    """Ordinary experts with the weights that loops make, in float64."""
    slow = copy.deepcopy(experts)
    with torch.no_grad():
        for weight in (slow.input_weight, slow.down):
            for e, matrix in enumerate(weight):
                matrix.copy_(by_loops(matrix.clone(), bits[e], group))
    slow.double().backend = "loop"
    return slow(rows.double(), counts)


# ------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [1, 7, 32, 1000])
@pytest.mark.parametrize("shape", [(3, 64), (5, 33), (1, 1), (2, 70)])
def test_weights_become_what_the_definition_makes_of_each_number(bits, group, shape):
    torch.manual_seed(0)
    weight = torch.randn(2, *shape) * torch.tensor([0.01, 100.0])[:, None, None]
    weight[0, 0] = 0.0
    held = QuantisedWeight(weight, bits, group)
    for e, matrix in enumerate(weight):
        assert torch.equal(held.decode(e), by_loops(matrix, bits, group))


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), st.data())
def test_no_number_moves_by_more_than_half_a_scale(dtype, data):
    size, seed = data.draw(st.integers(-8, 4)), data.draw(st.integers(0, 99))
    bits, group = data.draw(st.sampled_from([4, 8])), data.draw(st.sampled_from([1, 3, 16, 99]))
    torch.manual_seed(seed)
    weight = (torch.randn(1, 4, 50) * 10.0**size).to(dtype)
    held = QuantisedWeight(weight, bits, group)
    assert held.scales.dtype == dtype and held.scales.min() > 0
    scales = held.scales[0].double().repeat_interleave(group, dim=1)[:, :50]
    gap = (held.decode(0).double() - weight[0].double()).abs()
    assert (gap <= scales / 2 * (1 + 1e-4)).all()


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 32), (4, 128), (8, 1000)])
def test_the_error_is_that_of_uniform_rounding(bits, group):
    experts = make(3, 256, 256)
    small = quantise(experts, bits, group)
    found = errors(experts, small)
    for e in range(3):
        noise = whole = 0.0
        for weight, held in zip((experts.gate_up, experts.down), small.weights, strict=True):
            each = held.scales[e].repeat_interleave(group, dim=1)[:, :256]
            # The variance of a number drawn uniformly within half a scale.
            noise += float(each.detach().square().sum()) / 12
            whole += float(weight[e].detach().square().sum())
        # The largest number of a group has no error.
        exact = math.sqrt(1 - 1 / min(group, 256))
        assert found[e] == pytest.approx(math.sqrt(noise / whole) * exact, rel=0.02)


def test_bytes_are_those_of_codes_scales_and_biases():
    experts = make(4, 40, 27, bias=True)
    for bits, row in ((8, lambda n: n), (4, lambda n: -(-n // 2))):
        codes = 4 * (54 * row(40) + 40 * row(27))
        scales = 4 * (54 * 2 + 40 * 1)
        assert quantise(experts, bits).nbytes == codes + 4 * scales + 4 * 4 * (54 + 40)
    mixed = quantise(experts, [8, 4, 4, 8]).nbytes
    assert mixed * 2 == quantise(experts, 8).nbytes + quantise(experts, 4).nbytes
    assert quantise(experts.bfloat16(), 8, 2**40).down.scales.nbytes == 4 * 40 * 2


# ---------------------------------------------------------------------------------- the product


@pytest.mark.parametrize("bits", [8, 4, [8, 4, 4, 8]])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tile", [kernel.TILE, 100])
def test_outputs_and_gradients_are_those_of_the_definition(
    bits, activation, bias, tile, monkeypatch
):
    monkeypatch.setattr(kernel, "TILE", tile)
    experts = make(activation=activation, bias=bias)
    small = quantise(experts, bits, group=16)
    each = [bits] * 4 if isinstance(bits, int) else bits
    leaf, other = (batch().requires_grad_() for _ in range(2))
    wanted = specified(experts, other, COUNTS, each, 16)
    y = small(leaf, COUNTS)
    assert_close(y, wanted)
    assert_close(gradients(y, leaf)[0], gradients(wanted, other)[0])


def test_float64_rows_are_exact_to_their_rounding_and_can_be_differentiated_twice():
    small = quantise(make(bias=True).double(), 4, group=16)
    ordinary = small.dequantise()
    rows = batch(dtype=torch.float64)
    assert_close(small(rows, COUNTS), ordinary(rows, COUNTS), relative=1e-13)
    rows = rows.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: small(x, COUNTS), rows)
    assert torch.autograd.gradgradcheck(lambda x: small(x, COUNTS), rows)
    ordinary.backend = "loop"
    ours, theirs = (
        jvp(lambda x, part=part: part(x, COUNTS), (rows.detach(),), (torch.ones_like(rows),))
        for part in (small, ordinary)
    )
    assert_close(ours[1], theirs[1], relative=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_stay_within_their_rounding(dtype):
    experts = make().to(dtype)
    small, rows = quantise(experts, 8), batch().to(dtype)
    y = small(rows, COUNTS)
    assert y.dtype == dtype
    wanted = small.dequantise().double()(rows.double(), COUNTS)
    assert_close(y, wanted, relative=0.02 if dtype == torch.bfloat16 else 0.003)


def test_weights_have_no_gradients_and_biases_do():
    small = quantise(make(bias=True), 8)
    small(batch(), COUNTS).square().sum().backward()
    have = {name for name, parameter in small.named_parameters() if parameter.grad is not None}
    assert have == {"gate_up_bias", "down_bias"}


@pytest.mark.parametrize("way", DISPATCHES)
def test_every_dispatch_gives_what_it_gives_with_the_dequantised_weights(way):
    torch.manual_seed(0)
    router, experts = TopKRouter(40, 4, 2), quantise(make(), 4)
    x, mask = torch.randn(2, 7, 40), torch.rand(2, 7) < 0.7
    x = x.masked_fill(~mask[..., None], math.nan)
    ours = MoELayer(router, experts, dispatch=DISPATCHES[way])
    theirs = MoELayer(router, experts.dequantise(), dispatch=DISPATCHES[way])
    assert_close(ours(x, mask=mask)[0], theirs(x, mask=mask)[0])


def test_no_rows_and_autocast_are_served():
    small = quantise(make(), 8)
    assert small(torch.empty(0, 40), torch.zeros(4, dtype=torch.long)).shape == (0, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert small(batch(), COUNTS).dtype == torch.bfloat16


@pytest.mark.parametrize("backward", [False, True])
def test_a_copy_of_all_weights_is_never_there(backward):
    experts = make(32, 128, 256)
    small = quantise(experts, 4)
    rows = torch.randn(64, 128, requires_grad=backward)
    counts = torch.full((32,), 2)

    def run():
        y = small(rows, counts)
        if backward:
            torch.autograd.grad(y.sum(), rows)

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(accumulate(change for _, change in changes))
    one, every = nbytes(experts) / 32, nbytes(experts)
    assert peak < 2 * one < every / 10


# --------------------------------------------------------------------------------- as a module


def test_dtype_copies_and_state_keep_what_the_module_computes():
    experts = make(bias=True)
    small, rows = quantise(experts, [8, 4, 4, 8]), batch()
    y = small(rows, COUNTS)
    assert torch.equal(copy.deepcopy(small)(rows, COUNTS), y)
    other = quantise(make(seed=5, bias=True), [8, 4, 4, 8])
    assert not torch.equal(other(rows, COUNTS), y)
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(rows, COUNTS), y)
    narrow = copy.deepcopy(small).to(torch.bfloat16)
    assert narrow.down.codes.dtype == torch.int8 and narrow.down.scales.dtype == torch.bfloat16
    assert_close(narrow(rows.bfloat16(), COUNTS), y, relative=0.05)
    assert torch.equal(narrow.to(torch.float32).down.codes, small.down.codes)


def test_what_is_quantised_stays_as_it_was_and_draws_no_random_numbers():
    experts = make()
    before = copy.deepcopy(experts.state_dict())
    state = torch.get_rng_state()
    ordinary = quantise(experts.eval(), 4).dequantise()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in experts.named_parameters())
    assert not ordinary.training and ordinary.gate_up.requires_grad


def test_quantising_what_was_dequantised_changes_nothing():
    small = quantise(make(), 4)
    again = quantise(small.dequantise(), 4)
    assert torch.equal(again.down.codes, small.down.codes)


def test_its_printed_form_says_bits_and_group():
    assert "inputs=40, bits=8, group=16)" in repr(quantise(make(), 8, 16))
    assert "bits=6.0 (mean), group=32)" in repr(quantise(make(), [8, 4, 4, 8]))


# ------------------------------------------------------------------------------------ in a model


def build(config=MOE, seed=0):
    torch.manual_seed(seed)
    return Transformer(config).eval()


def test_a_model_of_quantised_experts_computes_as_with_their_dequantised_weights():
    model = build()
    small, tokens = quantise_model(model, 4), torch.randint(50, (2, 9))
    for block, held in zip(model.blocks, small.blocks, strict=True):
        assert isinstance(held.mlp.experts, QuantisedExperts) and not held.mlp.training
        block.mlp.experts = held.mlp.experts.dequantise()
    assert_close(small(tokens).logits, model(tokens).logits)
    ours, theirs = (generation.generate(part, tokens, 6) for part in (small, model))
    assert torch.equal(ours, theirs)


def test_all_takes_every_matrix_that_multiplies_but_a_tied_head():
    for tied in (True, False):
        model = build(TransformerConfig(50, 16, 2, 4, 12, n_experts=(0, 4), d_shared=8, tied=tied))
        small = quantise_model(model, which="all")
        left = {n for n, part in small.named_modules() if isinstance(part, nn.Linear)}
        assert left == ({"head"} if tied else set())
        assert (small.head.weight is small.embedding.weight) == tied
        kinds = {n for n, part in small.named_modules() if isinstance(part, QuantisedLinear)}
        assert {"blocks.0.mlp.down", "blocks.0.attention.out", "blocks.1.mlp.shared.down"} <= kinds
        tokens = torch.randint(50, (2, 9))
        assert_close(small(tokens).logits, model(tokens).logits, relative=0.05)


def test_a_linear_layer_gives_what_it_gives_with_the_weight_it_stands_for():
    torch.manual_seed(0)
    linear = nn.Linear(33, 7)
    small, x = QuantisedLinear(linear, bits=4, group=8), torch.randn(2, 3, 33)
    with torch.no_grad():
        linear.weight.copy_(by_loops(linear.weight.detach().clone(), 4, 8))
    assert_close(small(x), linear(x))


def test_bits_can_differ_from_expert_to_expert_and_layer_to_layer():
    bits = [[8, 4, 4, 4], [4, 4, 8, 8]]
    model = build()
    small = quantise_model(model, bits)
    plan = {"blocks.0.mlp.experts": (bits[0], 32), "blocks.1.mlp.experts": (bits[1], 32)}
    assert plan_of(small) == plan
    for block, held, each in zip(model.blocks, small.blocks, bits, strict=True):
        rounded = errors(block.mlp.experts, held.mlp.experts) > 0.02
        assert rounded.tolist() == [b == 4 for b in each]


def test_what_is_not_quantised_is_trained_through_what_is():
    small = quantise_model(build()).train()
    small(torch.randint(50, (2, 9))).logits.square().mean().backward()
    missing = {n for n, p in small.named_parameters() if p.requires_grad and p.grad is None}
    assert not missing and small.embedding.weight.grad.abs().sum() > 0


def test_the_trained_model_loses_less_than_0_002_nats_in_8_bits_and_0_02_in_4():
    model = checkpoints.load(corpora.data_file("tiny-moe"), dtype=torch.float32)

    def losses(part):
        return corpora.held_out_losses(part, ("code", "incidents"), batch=8, limit=24)

    before = losses(model)
    for bits, most in ((8, 0.002), (4, 0.02)):
        for name, loss in losses(quantise_model(model, bits)).items():
            assert abs(loss - before[name]) < most, (bits, name)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bits": 3}, "bits=3 is neither 8 nor 4"),
        ({"bits": True}, "bits=True is neither 8 nor 4"),
        ({"bits": 8.0}, "bits=8.0 is neither 8 nor 4"),
        ({"bits": [8, 4, 2, 8]}, "bits=2 is neither 8 nor 4"),
        ({"bits": [8, 4]}, "bits=[8, 4] has 2 entries for 4 experts"),
        ({"group": 0}, "group=0 must be at least 1"),
        ({"group": 1.5}, "group=1.5 must be a whole number"),
    ],
)
def test_impossible_bits_and_groups_are_named(arguments, said, unchecked):
    with pytest.raises(ValueError) as caught:
        quantise(make(), **arguments)
    assert str(caught.value) == said


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused_by_their_place(wrong):
    model = build()
    with torch.no_grad():
        model.blocks[1].mlp.experts.down[2, 3, 4] = wrong
    with pytest.raises(ValueError) as caught:
        quantise_model(model)
    said = "blocks.1.mlp.experts: down[2] holds NaN or infinity, which no code stands for"
    assert str(caught.value) == said


def test_a_model_that_has_nothing_to_quantise_and_unknown_parts_are_refused():
    dense = build(TransformerConfig(50, 16, 2, 4, 12))
    with pytest.raises(ValueError, match="which='experts': the model has none to quantise"):
        quantise_model(dense)
    with pytest.raises(ValueError, match="which='matrices' is neither experts nor all"):
        quantise_model(dense, which="matrices")
    with pytest.raises(ValueError, match="bits has 1 lists, but the model has 2 Experts"):
        quantise_model(build(), [[8, 8, 8, 4]])


def test_rows_that_do_not_fit_are_refused(unchecked):
    small = quantise(make(), 8)
    with pytest.raises(ValueError, match="rows have 39 features, not d_model=40"):
        small(torch.zeros(9, 39), COUNTS)
    with pytest.raises(ValueError, match="counts sum to 9, but there are 8 rows"):
        small(torch.zeros(8, 40), COUNTS)
