"""Each router against the specification of its paper: experts, weights, demand and gradients."""

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

from .tools import assert_close, assert_decided, sizes, weight_gradients


def agrees(router, x, decide, mask=None):
    """The router's decision and gradients are those of `decide(x)`; returns the routing."""
    x.requires_grad_()
    routing = router(x, mask=mask)
    decision = decide(x)
    assert_decided(routing, decision)
    leaves = [x, *router.parameters()]
    for ours, theirs in zip(*weight_gradients(routing, decision, leaves)):
        assert_close(ours, theirs, floor=0.1)
    return routing


@st.composite
def grouped(draw):
    """(tokens, n_experts, k, n_groups, groups_kept) that fit each other."""
    n_groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kept = draw(st.integers(1, n_groups))
    return (
        draw(st.integers(0, 9)),
        n_groups * size,
        draw(st.integers(1, kept * size)),
        n_groups,
        kept,
    )


@given(
    grouped(),
    st.sampled_from(["softmax", "sigmoid"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 2.5]),
    st.booleans(),
    st.integers(0, 99),
)
def test_top_k_with_all_its_options_is_its_specification(
    shape, score, renormalize, biased, scale, shifted, seed
):
    tokens, n_experts, k, n_groups, groups_kept = shape
    torch.manual_seed(seed)
    options = dict(score=score, renormalize=renormalize, scale=scale)
    options |= dict(n_groups=n_groups, groups_kept=groups_kept)
    router = TopKRouter(5, n_experts, k, selection_bias=biased, logit_bias=shifted, **options)
    if shifted:
        torch.nn.init.normal_(router.logit_bias)
    offset = router.logit_bias if shifted else 0.0
    if biased:
        router.bias.copy_(torch.randn(n_experts) - 1)  # most biased scores are negative
    mask = torch.rand(tokens) < 0.8
    agrees(
        router,
        torch.randn(tokens, 5),
        lambda x: specification.top_k(
            x,
            router.weight,
            k,
            bias=router.bias,
            logit_bias=offset,
            mask=mask.tolist(),
            **options,
        ),
        mask,
    )


@given(sizes(), st.integers(0, 99))
def test_switch_is_its_specification(shape, seed):
    tokens, n_experts, _ = shape
    torch.manual_seed(seed)
    router = SwitchRouter(5, n_experts)
    mask = torch.rand(tokens) < 0.8
    x = torch.randn(tokens, 5)
    agrees(router, x, lambda x: specification.switch(x, router.weight, mask.tolist()), mask)


@given(sizes(), st.booleans(), st.booleans(), st.integers(0, 99))
def test_gshard_is_its_specification_whatever_the_draw_was(shape, training, always, seed):
    tokens, n_experts, _ = shape
    torch.manual_seed(seed)
    router = GShardRouter(5, n_experts + 1, second="always" if always else "random")
    router.train(training)
    x, mask = torch.randn(tokens, 5), torch.rand(tokens) < 0.8
    torch.manual_seed(seed)
    kept = (router(x, mask=mask).experts[:, 1] <= n_experts).tolist()
    torch.manual_seed(seed)
    agrees(
        router,
        x,
        lambda x: specification.gshard(x, router.weight, kept, mask.tolist()),
        mask,
    )
    if always or not training:
        assert kept == mask.tolist()


@pytest.mark.parametrize("gate", [0.05, 0.2, 0.4, 0.5])
def test_gshard_keeps_the_second_with_twice_its_gate_as_probability(gate):
    torch.manual_seed(0)
    logits = torch.tensor([[1 - gate, gate]]).log().repeat(20_000, 1)
    router = GShardRouter(2, 2)
    torch.nn.init.eye_(router.weight)
    routing = router(logits)
    assert (routing.experts[:, 0] == 0).all()
    assert routing.demand[1].item() / 20_000 == pytest.approx(min(1, 2 * gate), abs=0.015)


@given(sizes(), st.booleans(), st.integers(0, 99))
def test_noisy_top_k_is_its_specification_for_the_noise_that_was_drawn(shape, training, seed):
    tokens, n_experts, k = shape
    torch.manual_seed(seed)
    router = NoisyTopKRouter(5, n_experts, k).train(training)
    torch.nn.init.normal_(router.noise_weight)
    x = torch.randn(tokens, 5)
    torch.manual_seed(seed)
    drawn = router(x)
    noise = ((drawn.noisy - drawn.logits) / drawn.sigma).detach()
    torch.manual_seed(seed)
    agrees(
        router,
        x,
        lambda x: specification.noisy_top_k(x, router.weight, router.noise_weight, k, noise),
    )
    assert training or not noise.any()


def test_the_noise_of_noisy_top_k_is_standard_normal_times_softplus():
    torch.manual_seed(0)
    router = NoisyTopKRouter(4, 8, 2)
    torch.nn.init.normal_(router.noise_weight)
    x = torch.randn(4000, 4)
    routing = router(x)
    assert_close(routing.sigma, torch.log1p(torch.exp(x @ router.noise_weight.T)))
    noise = (routing.noisy - routing.logits) / routing.sigma
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert (noise.abs() < 1).float().mean().item() == pytest.approx(0.6827, abs=0.01)


def test_the_jitter_of_switch_multiplies_the_input_within_its_bounds():
    torch.manual_seed(0)
    router = SwitchRouter(8, 8, jitter=0.1)
    torch.nn.init.eye_(router.weight)
    x = torch.rand(2000, 8) + 0.5
    factors = router(x).logits / x
    assert 0.9 <= factors.min() < 0.901 and 1.099 < factors.max() <= 1.1 + 1e-6
    assert factors.mean().item() == pytest.approx(1, abs=0.002)
    assert (factors[:, 0] - factors[:, 1]).std() > 0.05  # drawn for every feature anew


@given(sizes(), st.booleans(), st.integers(0, 99))
def test_expert_choice_is_its_specification_and_balanced(shape, fractional, seed):
    tokens, n_experts, k = shape
    k = k - 0.5 if fractional else k
    torch.manual_seed(seed)
    router = ExpertChoiceRouter(5, n_experts, k)
    mask = torch.rand(tokens) < 0.8
    routing = agrees(
        router,
        torch.randn(tokens, 5),
        lambda x: specification.expert_choice(x, router.weight, k, mask.tolist()),
        mask,
    )
    places = math.ceil(int(mask.sum()) * k / n_experts)
    assert routing.counts.tolist() == [places] * n_experts
    assert not routing.overflow.any()


def test_expert_choice_counts_places_by_the_decimal_number_it_was_given():
    # 100 * 1.1 / 10 is 11; in floats 11.000000000000002, rounded up 12.
    assert ExpertChoiceRouter(4, 10, 1.1)(torch.randn(100, 4)).counts.tolist() == [11] * 10


def test_expert_choice_gives_ties_to_the_earlier_token_and_the_lower_expert():
    routing = ExpertChoiceRouter(3, 4, 2)(torch.zeros(6, 3))
    assert routing.experts[:3].tolist() == [[0, 1, 2, 3]] * 3
    assert (routing.experts[3:] == 4).all()


def test_expert_choice_lets_a_later_token_decide_over_an_earlier_one():
    router = ExpertChoiceRouter(2, 2, 1)
    torch.nn.init.eye_(router.weight)
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert router(x).experts.tolist() == [[0], [1]]
    changed = router(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    assert changed.experts[0].tolist() == [1]
    assert not router.causal


@pytest.mark.parametrize(("vocab_size", "n_experts"), [(1, 1), (100, 10), (103, 8), (5, 9)])
def test_the_hash_table_is_fixed_by_its_seed_and_balanced_to_within_one(vocab_size, n_experts):
    torch.manual_seed(0)
    router = HashRouter(n_experts, vocab_size, seed=3)
    sizes = torch.bincount(router.table, minlength=n_experts)
    assert len(sizes) == n_experts and sizes.max() - sizes.min() <= 1
    torch.manual_seed(1)
    assert HashRouter(n_experts, vocab_size, seed=3).table.equal(router.table)
    if vocab_size > 50:
        assert not HashRouter(n_experts, vocab_size, seed=4).table.equal(router.table)
        assert not router.table.equal(torch.arange(vocab_size) % n_experts)


def balanced_by_the_paper(frequencies, n_experts, order):
    """The expert of each id that occurs: most frequent first, to the emptiest expert."""
    loads, table = [0.0] * n_experts, {}
    for token_id in sorted(order, key=lambda i: -frequencies[i]):  # stable: ties stay in order
        if frequencies[token_id]:
            table[token_id] = min(range(n_experts), key=lambda e: (loads[e], e))
            loads[table[token_id]] += frequencies[token_id]
    return table, loads


COUNTS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 1000)), min_size=1, max_size=60)


@given(COUNTS, st.integers(1, 9), st.integers(0, 9))
def test_a_table_by_frequency_is_the_paper_s_and_deals_out_what_never_occurs(counts, n, seed):
    router = HashRouter(n, len(counts), seed=seed, frequencies=counts)
    dealt = HashRouter(n, len(counts), seed=seed).table.tolist()
    # Without frequencies, ids are dealt in the order that the seed draws.
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(counts), generator=generator).argsort().tolist()
    table, loads = balanced_by_the_paper(counts, n, order)
    assert router.table.tolist() == [table.get(i, dealt[i]) for i in range(len(counts))]
    assert max(loads) <= sum(counts) / n + max(counts)
    # Counts and shares, lists and tensors mean the same.
    for same in (torch.tensor(counts), torch.tensor(counts) / 1024, [c * 2.0 for c in counts]):
        again = HashRouter(n, len(counts), seed=seed, frequencies=same)
        assert again.table.equal(router.table)


def test_ten_ids_by_hand_as_a_greedy_table_places_them():
    # 9 to 0; 7 to 1; 5 to 2; then 4 to 2 (5), 3 to 1 (7), 2 to 0 (9, tied with 2), 1 to 2 (9).
    router = HashRouter(3, 7, frequencies=[9, 7, 5, 4, 3, 2, 1])
    assert router.table.tolist() == [0, 1, 2, 2, 1, 0, 2]


def test_a_balanced_table_is_in_the_state_and_comes_back_from_it():
    kept = HashRouter(4, 30, frequencies=list(range(30))).state_dict()
    router = HashRouter(4, 30)
    assert list(kept) == ["table"] and not kept["table"].equal(router.table)
    router.load_state_dict(kept)
    ids = torch.arange(30)
    assert router(torch.zeros(30, 2), token_ids=ids).experts[:, 0].equal(kept["table"])


def test_hash_agrees_with_the_router_of_deepseek_v4_which_looks_its_experts_up():
    deepseek = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    sizes = {"hidden_size": 4, "num_local_experts": 5, "num_experts_per_tok": 1, "vocab_size": 30}
    theirs = deepseek.DeepseekV4HashRouter(
        deepseek.DeepseekV4Config(**sizes, routed_scaling_factor=1.0)
    )
    ours = HashRouter(5, 30, frequencies=list(range(30)))
    theirs.tid2eid.copy_(ours.table[:, None])
    torch.nn.init.normal_(theirs.weight)
    x, ids = torch.randn(2, 8, 4), torch.randint(30, (2, 8))
    _, weights, experts = theirs(x, ids)
    routing = ours(x.flatten(0, 1), token_ids=ids.flatten())
    assert routing.experts.equal(experts)
    assert_close(routing.weights, weights)  # a single renormalised weight is 1


def test_hash_sends_each_id_to_its_place_in_the_table_with_weight_one_whatever_x_is():
    router = HashRouter(4, 50)
    ids, mask = torch.tensor([7, 49, 7, -1, 0]), torch.tensor([True, True, True, False, True])
    routing = router(torch.randn(5, 3), mask=mask, token_ids=ids)
    table = router.table.tolist()
    assert routing.experts.tolist() == [[table[7]], [table[49]], [table[7]], [4], [table[0]]]
    assert routing.weights.tolist() == [[1.0], [1.0], [1.0], [0.0], [1.0]]
    assert routing.demand.sum() == 4 and not list(router.parameters())
    assert router(torch.zeros(5, 3), mask=mask, token_ids=ids).experts.equal(routing.experts)
