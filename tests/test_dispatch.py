import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ref import Capacity, ExpertChoiceRouter, Experts, TopKRouter, dispatch

from .tools import assert_close, gradients, sizes


def routed(shape: tuple[int, int, int], seed: int):
    """Tokens, and a routing of them in which some tokens are padding."""
    tokens, n_experts, k = shape
    torch.manual_seed(seed)
    x = torch.randn(tokens, 4)
    mask = torch.rand(tokens) < 0.8
    return x, TopKRouter(4, n_experts, k)(x, mask=mask)


@given(sizes(), st.integers(0, 99))
def test_rows_are_the_served_slots_grouped_by_expert_in_token_order(shape, seed):
    x, routing = routed(shape, seed)
    plan = dispatch.plan(routing)
    expected = [
        (e, t, s)
        for e in range(routing.n_experts)
        for t, slots in enumerate(routing.experts.tolist())
        for s, chosen in enumerate(slots)
        if chosen == e
    ]
    k = routing.experts.shape[1]
    assert plan.order.tolist() == [t * k + s for _, t, s in expected]
    assert plan.tokens.tolist() == [t for _, t, _ in expected]
    assert plan.counts.tolist() == [
        sum(e == expert for e, _, _ in expected) for expert in range(routing.n_experts)
    ]
    assert dispatch.permute(x, plan).equal(x[plan.tokens])


@given(sizes(), st.integers(0, 99))
def test_combine_is_the_weighted_sum_over_the_slots_of_each_token(shape, seed):
    x, routing = routed(shape, seed)
    plan = dispatch.plan(routing)
    answers = torch.randn(len(plan.order), 4)
    expected = torch.zeros_like(x)
    where = {slot: row for row, slot in enumerate(plan.order.tolist())}
    k = routing.experts.shape[1]
    for t in range(len(x)):
        for s in range(k):
            if t * k + s in where:
                expected[t] += routing.weights[t, s] * answers[where[t * k + s]]
    torch.testing.assert_close(dispatch.combine(answers, plan, routing), expected)


@given(sizes(), st.integers(0, 99))
def test_there_and_back_with_weights_that_sum_to_one_is_the_identity_on_real_tokens(shape, seed):
    x, routing = routed(shape, seed)
    plan = dispatch.plan(routing)
    back = dispatch.combine(dispatch.permute(x, plan), plan, routing)
    torch.testing.assert_close(back, x * routing.mask[:, None])


def test_the_gradient_of_combine_reaches_rows_and_weights():
    x, routing = routed((5, 3, 2), seed=0)
    plan = dispatch.plan(routing)
    rows = dispatch.permute(x, plan).requires_grad_()
    weights = routing.weights.detach().requires_grad_()
    leaf = type(routing)(**{**vars(routing), "weights": weights})
    d_rows, d_weights = gradients(dispatch.combine(rows, plan, leaf), rows, weights)
    torch.manual_seed(1)
    out = torch.randn(x.shape, dtype=torch.float64).to(
        x
    )  # the gradient that arrives, as in `gradients`
    flat = weights.flatten()[plan.order]
    torch.testing.assert_close(d_rows, out[plan.tokens] * flat[:, None])
    torch.testing.assert_close(
        d_weights.flatten()[plan.order], (out[plan.tokens] * rows).sum(dim=1)
    )


def test_combine_adds_in_float32_and_answers_in_the_dtype_of_the_rows():
    x, routing = routed((50, 8, 8), seed=0)
    plan = dispatch.plan(routing)
    rows = dispatch.permute(x, plan)
    exact = dispatch.combine(rows.bfloat16().double(), plan, routing)
    rounded = dispatch.combine(rows.bfloat16(), plan, routing)
    assert rounded.dtype == torch.bfloat16
    assert rounded.equal(exact.to(torch.bfloat16))  # one rounding, at the end


def test_answers_of_nobody_cannot_leak_into_a_token():
    x, routing = routed((6, 3, 2), seed=1)
    assert not routing.mask.all()
    plan = dispatch.plan(routing)
    y = dispatch.combine(torch.full((len(plan.order), 4), 7.0), plan, routing)
    assert (y[~routing.mask] == 0).all()


def routings(shape, seed):
    """One batch with padding under every kind of decision that dispatch may meet."""
    tokens, n_experts, k = shape
    x, full = routed(shape, seed)
    x.requires_grad_()
    router = TopKRouter(4, n_experts, k)
    full = router(x, mask=full.mask)
    yield x, router, full
    yield x, router, Capacity(0.6)(full)
    yield x, router, Capacity(0.6, overflow="reroute")(full)
    chooser = ExpertChoiceRouter(4, n_experts, k)
    yield x, chooser, chooser(x, mask=full.mask)


@given(sizes(), st.integers(0, 99))
def test_the_one_hot_tensor_has_one_place_for_each_served_slot_and_no_place_twice(shape, seed):
    for x, _, routing in routings(shape, seed):
        places = dispatch.one_hot(routing)
        tokens, n_experts, capacity = places.shape
        assert (tokens, n_experts) == (len(x), routing.n_experts)
        assert ((places == 0) | (places == 1)).all()
        assert places.sum() == routing.counts.sum()
        assert (places.sum(dim=0) <= 1).all()  # no place taken twice
        for t in range(tokens):
            served = sorted(e for e in routing.experts[t].tolist() if e < n_experts)
            assert places[t].sum(dim=-1).nonzero()[:, 0].tolist() == served
        for e, n in enumerate(routing.counts.tolist()):  # in token order, from the first place on
            filled = places[:, e].nonzero()
            assert filled[:, 1].tolist() == list(range(n))
        assert capacity == max(int(routing.counts.max()), 1)


@given(sizes(), st.booleans(), st.integers(0, 99))
def test_the_einsum_is_the_sorted_path_forward_and_backward(shape, bias, seed):
    for x, router, routing in routings(shape, seed):
        experts = Experts(routing.n_experts, 4, 8, bias=bias)
        plan = dispatch.plan(routing)
        rows = experts(dispatch.permute(x, plan), plan.counts)
        by_rows = dispatch.combine(rows, plan, routing)
        by_einsum = dispatch.one_hot_einsum(x, routing, experts)
        assert_close(by_einsum, by_rows)
        leaves = [x, router.weight, *experts.parameters()]
        pairs = []
        for y in (by_einsum, by_rows):
            torch.manual_seed(1)
            loss = (y * torch.randn_like(y)).sum()
            pairs.append(
                torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
            )
        for ours, theirs in zip(*pairs):
            assert_close(ours, theirs, floor=0.1)


def test_the_einsum_gives_nothing_for_no_tokens_and_for_nothing_but_padding():
    router, experts = TopKRouter(4, 3, 2), Experts(3, 4, 8, bias=True)
    for x, mask in [(torch.zeros(0, 4), None), (torch.randn(5, 4), torch.zeros(5).bool())]:
        y = dispatch.one_hot_einsum(x, router(x, mask=mask), experts)
        assert y.shape == x.shape and not y.any()
