import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ref import (
    ExpertChoiceRouter,
    GShardRouter,
    HashRouter,
    NoisyTopKRouter,
    SwitchRouter,
    TopKRouter,
    specification,
)

from .tools import assert_close, sizes

LEARNED = {
    "top-k": lambda: TopKRouter(4, 6, 2, score="sigmoid", selection_bias=True),
    "noisy": lambda: NoisyTopKRouter(4, 6, 2),
    "switch": lambda: SwitchRouter(4, 6, jitter=0.3),
    "gshard": lambda: GShardRouter(4, 6),
    "expert choice": lambda: ExpertChoiceRouter(4, 6, 2),
}


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
    decision = specification.top_k(x, router.weight, k, renormalize=renormalize)
    for t, pairs in enumerate(decision.slots):
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


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_is_float32_at_least_whatever_the_dtype_of_the_model(name, dtype):
    torch.manual_seed(0)
    router = LEARNED[name]().eval().to(dtype)
    x = torch.randn(50, 4).to(dtype)
    routing = router(x)
    exact = torch.promote_types(dtype, torch.float32)
    assert {routing.logits.dtype, routing.weights.dtype, routing.scores.dtype} == {exact}
    assert routing.logits.equal(x.to(exact) @ router.weight.to(exact).T)


def test_logits_that_differ_in_the_tenth_digit_are_told_apart_in_float64():
    router = TopKRouter(2, 3, 1).double()
    with torch.no_grad():
        rows = torch.tensor([[1, 0], [1 + 1e-10, 0], [1 + 1e-12, 0]], dtype=torch.float64)
        router.weight.copy_(rows)
    assert router(torch.ones(1, 2, dtype=torch.float64)).experts.tolist() == [[1]]


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


# -------------------------------------------------------------------------- what all share

RANDOM = ["noisy", "switch", "gshard"]


@pytest.mark.parametrize("name", LEARNED)
def test_only_training_is_random_and_a_seed_reproduces_it(name):
    torch.manual_seed(0)
    router, x = LEARNED[name](), torch.randn(40, 4)

    def weights(seed):
        torch.manual_seed(seed)
        return router(x).weights

    assert weights(1).equal(weights(1))
    assert weights(1).equal(weights(2)) == (name not in RANDOM)
    router.eval()
    before = torch.get_rng_state()
    assert router(x).weights.equal(router(x).weights)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("name", LEARNED)
def test_padding_holding_nan_is_nobodys_and_changes_nothing_for_the_others(name):
    torch.manual_seed(0)
    router, x = LEARNED[name]().eval(), torch.randn(9, 4)
    mask = torch.arange(9) % 3 > 0
    alone = router(x[mask])
    x[~mask] = float("nan")
    routing = router(x, mask=mask)
    assert (routing.experts[~mask] == 6).all()
    assert not routing.weights[~mask].any() and not routing.scores[~mask].any()
    assert routing.experts[mask].equal(alone.experts)
    assert_close(routing.weights[mask], alone.weights)
    assert routing.demand.equal(alone.demand) and routing.entropy.isfinite()
    for gradient in torch.autograd.grad(
        routing.weights.square().sum(), list(router.parameters()), materialize_grads=True
    ):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LEARNED)
def test_equal_scores_go_to_the_lowest_indices(name):
    router = LEARNED[name]().eval()
    routing = router(torch.zeros(1, 4))
    slots = routing.experts.shape[1]
    assert routing.experts.tolist() == [list(range(slots))]


@pytest.mark.parametrize("name", LEARNED)
def test_every_router_computes_in_float32_under_autocast_and_in_bfloat16(name):
    torch.manual_seed(0)
    router, x = LEARNED[name]().eval(), torch.randn(30, 4)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(x)
    assert cast.logits.equal(plain.logits) and cast.weights.equal(plain.weights)
    half = router.bfloat16()(x.bfloat16())
    assert half.logits.dtype == half.weights.dtype == half.scores.dtype == torch.float32
    exact = router.float()(x.bfloat16().float())
    assert half.experts.equal(exact.experts) and half.weights.equal(exact.weights)


@pytest.mark.parametrize("name", LEARNED)
def test_no_tokens_give_an_empty_routing(name):
    routing = LEARNED[name]()(torch.zeros(0, 4))
    assert len(routing.experts) == 0 and routing.experts.shape[1] >= 1
    assert routing.demand.tolist() == [0] * 6


@pytest.mark.parametrize(
    "change", [lambda r: r.bfloat16(), lambda r: r.half(), lambda r: r.to(torch.float64)]
)
def test_the_selection_bias_stays_float32_and_exact_when_the_model_changes_dtype(change):
    router = TopKRouter(4, 6, 2, selection_bias=True)
    values = torch.linspace(1e-3, 1.001, 6)  # more digits than 16 bits hold
    router.bias.copy_(values)
    changed = change(router)
    assert changed.weight.dtype != torch.float32
    assert changed.bias.dtype == torch.float32 and changed.bias.equal(values)
    other = change(TopKRouter(4, 6, 2, selection_bias=True))
    other.load_state_dict(changed.state_dict())
    assert other.bias.equal(values) and "bias" in changed.state_dict()


def test_the_selection_bias_follows_to_another_device():
    assert TopKRouter(4, 6, 2, selection_bias=True).to("meta").bias.device.type == "meta"


def test_the_selection_bias_steers_the_choice_but_not_the_weights_and_gets_no_gradient():
    router = TopKRouter(3, 3, 2, score="sigmoid", renormalize=False, selection_bias=True)
    torch.nn.init.eye_(router.weight)
    router.bias.copy_(torch.tensor([0.0, 0.0, 5.0]))
    routing = router(torch.tensor([[2.0, 1.0, -3.0]]))
    assert routing.experts.tolist() == [[2, 0]]
    torch.testing.assert_close(routing.weights, torch.tensor([[-3.0, 2.0]]).sigmoid())
    assert [name for name, _ in router.named_parameters()] == ["weight"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKRouter(4, 8, 2, score="tanh"), "score='tanh' is neither softmax nor sigmoid"),
        (lambda: TopKRouter(4, 8, 2, n_groups=3), "n_groups=3 does not divide n_experts=8"),
        (lambda: TopKRouter(4, 8, 2, n_groups=0), "n_groups=0 must be at least 1"),
        (
            lambda: TopKRouter(4, 8, 2, n_groups=4, groups_kept=5),
            "groups_kept=5 is more than n_groups=4",
        ),
        (
            lambda: TopKRouter(4, 8, 3, n_groups=4, groups_kept=1),
            "groups_kept=1 leaves 2 experts, fewer than k=3",
        ),
        (lambda: NoisyTopKRouter(4, 8, 9), "k=9 is more than n_experts=8"),
        (lambda: GShardRouter(4, 1), "k=2 is more than n_experts=1"),
        (lambda: GShardRouter(4, 8, second="never"), "second='never' is neither random nor always"),
        (lambda: SwitchRouter(4, 8, jitter=1.0), "jitter=1.0 is not between 0 and 1"),
        (lambda: SwitchRouter(4, 8, jitter=-0.1), "jitter=-0.1 is not between 0 and 1"),
        (lambda: ExpertChoiceRouter(4, 8, 9), "k=9 is not more than 0 and at most n_experts=8"),
        (lambda: ExpertChoiceRouter(4, 8, 0), "k=0 is not more than 0"),
        (lambda: HashRouter(0, 50), "n_experts=0 must be at least 1"),
        (lambda: HashRouter(4, 0), "vocab_size=0 must be at least 1"),
        (lambda: HashRouter(4, 3, frequencies=[1, 2]), "shape \\[2\\] are not one for each of voc"),
        (lambda: HashRouter(4, 3, frequencies=torch.ones(1, 3)), "shape \\[1, 3\\] are not one"),
        (lambda: HashRouter(4, 3, frequencies=[1, -2, 0]), "frequencies\\[1\\]=-2 is not a finite"),
        (
            lambda: HashRouter(4, 2, frequencies=[1, math.nan]),
            "frequencies\\[1\\]=nan is not a fin",
        ),
        (
            lambda: HashRouter(4, 2, frequencies=[math.inf, 1]),
            "frequencies\\[0\\]=inf is not a fin",
        ),
        (lambda: HashRouter(4, 50)(torch.zeros(1, 2)), "token_ids=None"),
        (lambda: hashed(50), "token id 50 is outside 0 to vocab_size - 1=49"),
        (lambda: hashed(-1), "token id -1 is outside 0 to vocab_size - 1=49"),
    ],
)
def test_what_a_router_cannot_do_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def hashed(token_id):
    return HashRouter(4, 50)(torch.zeros(2, 3), token_ids=torch.tensor([0, token_id]))
