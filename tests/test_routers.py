import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ref import TopKRouter, checks

from .tools import assert_close, sizes


def certain(scores: list[list[float]], k: int, **options):
    """The routing of tokens whose logits are these."""
    logits = torch.tensor(scores)
    router = TopKRouter(logits.shape[1], logits.shape[1], k, **options)
    torch.nn.init.eye_(router.weight)
    return router(logits)


@given(sizes(), st.booleans(), st.integers(0, 99))
def test_experts_and_weights_are_those_of_the_specification(shape, renormalize, seed):
    tokens, n_experts, k = shape
    torch.manual_seed(seed)
    router = TopKRouter(5, n_experts, k, renormalize=renormalize)
    x = torch.randn(tokens, 5)
    routing = router(x)
    for t in range(tokens):
        pairs = checks.route(x[t], router.weight, k, renormalize)
        assert routing.experts[t].tolist() == [expert for expert, _ in pairs]
        assert_close(routing.weights[t], torch.stack([weight for _, weight in pairs]))


def test_the_worked_token_goes_to_experts_2_and_4():
    # Scores 0.05, 0.61, 0.09, 0.25 of experts 1 to 4; here they are counted from 0.
    logits = torch.tensor([[0.05, 0.61, 0.09, 0.25]]).log()
    top2 = certain(logits.tolist(), 2)
    assert top2.experts.tolist() == [[1, 3]]
    torch.testing.assert_close(top2.weights, torch.tensor([[0.61, 0.25]]) / 0.86)
    top1 = certain(logits.tolist(), 1, renormalize=False)
    assert top1.experts.tolist() == [[1]]
    torch.testing.assert_close(top1.weights, torch.tensor([[0.61]]))


def test_ties_go_to_the_lower_index_however_many_experts_tie():
    assert certain([[0.0, 1.0, 1.0, 1.0]], 2).experts.tolist() == [[1, 2]]
    routing = certain([[0.0] * 300], 7)
    assert routing.experts.tolist() == [[0, 1, 2, 3, 4, 5, 6]]


def test_k_equal_to_n_experts_uses_every_expert_once_with_the_softmax_as_weights():
    routing = certain([[1.0, 3.0, 2.0]], 3)
    assert routing.experts.tolist() == [[1, 2, 0]]
    torch.testing.assert_close(routing.weights, routing.scores.gather(-1, routing.experts))


def test_one_expert_gets_every_token_with_weight_one():
    routing = TopKRouter(4, 1, 1, renormalize=False)(torch.randn(5, 4))
    assert routing.counts.tolist() == [5]
    assert routing.weights.tolist() == [[1.0]] * 5


def test_large_logits_do_not_overflow():
    routing = certain([[3e38, -3e38, 0.0]], 2, renormalize=False)
    assert routing.weights.tolist() == [[1.0, 0.0]]
    assert routing.experts.tolist() == [[0, 1]]


def test_top1_with_renormalised_weights_gives_the_router_no_gradient():
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    for renormalize, flows in ((True, False), (False, True)):
        router = TopKRouter(4, 3, 1, renormalize=renormalize)
        (grad,) = torch.autograd.grad((router(x).weights ** 2).sum(), [router.weight])
        assert (grad.abs().max() > 1e-3) == flows


def test_padding_is_neither_routed_nor_counted_even_if_it_holds_nan():
    torch.manual_seed(0)
    router = TopKRouter(4, 3, 2)
    x = torch.randn(5, 4)
    mask = torch.tensor([True, False, True, False, True])
    alone = router(x[mask])
    x[~mask] = float("nan")
    routing = router(x, mask=mask)
    assert routing.experts[~mask].tolist() == [[3, 3]] * 2
    assert routing.weights[~mask].abs().sum() == 0
    assert routing.scores[~mask].abs().sum() == 0
    assert routing.experts[mask].equal(alone.experts)
    assert routing.demand.equal(alone.demand)
    (grad,) = torch.autograd.grad(routing.weights[:, 0].sum(), [router.weight])
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_is_float32_whatever_the_dtype_of_the_model(dtype):
    torch.manual_seed(0)
    router = TopKRouter(16, 8, 2).to(dtype)
    x = torch.randn(50, 16).to(dtype)
    routing = router(x)
    assert routing.logits.dtype == routing.weights.dtype == routing.scores.dtype == torch.float32
    assert routing.logits.equal(x.float() @ router.weight.float().T)


def test_autocast_changes_nothing():
    torch.manual_seed(0)
    router = TopKRouter(16, 8, 2)
    x = torch.randn(50, 16)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x)
    assert routing.logits.equal(plain.logits) and routing.weights.equal(plain.weights)


def test_the_input_is_left_as_it_was():
    x = torch.randn(5, 4)
    before = x.clone()
    TopKRouter(4, 3, 2)(x, mask=torch.tensor([True, False, True, False, True]))
    assert x.equal(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 8, 9), "k=9 is more than n_experts=8"),
        ((4, 8, 0), "k=0 must be at least 1"),
        ((4, 0, 1), "n_experts=0 must be at least 1"),
        ((0, 8, 1), "d_model=0 must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(*arguments)
