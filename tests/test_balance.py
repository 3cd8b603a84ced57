import copy
import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from moe_ref import (
    Capacity,
    ExpertChoiceRouter,
    GShardRouter,
    NoisyTopKRouter,
    SwitchRouter,
    TopKRouter,
    balance,
    specification,
)

from .tools import assert_close, make_layer, sizes

LOSSES = {
    "importance": (balance.importance_loss, specification.importance_loss),
    "switch": (balance.switch_loss, specification.switch_loss),
    "z": (balance.z_loss, specification.z_loss),
}


def same_value_and_gradients(ours, theirs, leaves):
    assert ours.shape == () and ours.dtype == torch.float32
    assert_close(ours, theirs, floor=1e-2)
    tied = [value + 0 * sum(leaf.sum() for leaf in leaves) for value in (ours, theirs)]
    for mine, other in zip(*(torch.autograd.grad(v, leaves, retain_graph=True) for v in tied)):
        assert_close(mine, other, floor=0.1)


def certain(logits, k=1, router=TopKRouter, **options):
    """The routing of tokens whose logits are these."""
    logits = torch.as_tensor(logits)
    router = router(logits.shape[1], logits.shape[1], k, **options)
    torch.nn.init.eye_(router.weight)
    return router(logits)


@pytest.mark.parametrize("name", LOSSES)
@given(sizes(), st.sampled_from(["softmax", "sigmoid"]), st.booleans(), st.integers(0, 99))
def test_losses_and_their_gradients_are_those_of_the_specification(
    name, shape, score, renormalize, seed
):
    tokens, n_experts, k = shape
    torch.manual_seed(seed)
    router = TopKRouter(5, n_experts, k, score=score, renormalize=renormalize)
    x, mask = torch.randn(tokens, 5, requires_grad=True), torch.rand(tokens) < 0.8
    decision = specification.top_k(
        x, router.weight, k, score=score, renormalize=renormalize, mask=mask.tolist()
    )
    loss, expected = LOSSES[name]
    same_value_and_gradients(loss(router(x, mask=mask)), expected(decision), [x, router.weight])


@given(st.integers(0, 4), st.integers(1, 4), sizes(), st.integers(0, 99))
def test_the_sequence_loss_is_that_of_the_specification(sequences, seq, shape, seed):
    _, n_experts, k = shape
    torch.manual_seed(seed)
    router = TopKRouter(5, n_experts, k, score="sigmoid")
    x = torch.randn(sequences * seq, 5, requires_grad=True)
    mask = torch.rand(len(x)) < 0.6  # some sequences are nothing but padding
    decision = specification.top_k(
        x, router.weight, k, score="sigmoid", mask=mask.tolist(), renormalize=True
    )
    ours = balance.sequence_loss(router(x, mask=mask), seq=seq)
    same_value_and_gradients(ours, specification.sequence_loss(decision, seq), [x, router.weight])


@given(sizes(), st.booleans(), st.integers(0, 99))
def test_the_load_loss_is_that_of_the_specification(shape, training, seed):
    tokens, n_experts, k = shape
    torch.manual_seed(seed)
    router = NoisyTopKRouter(5, n_experts, k).train(training)
    torch.nn.init.normal_(router.noise_weight)
    x, mask = torch.randn(tokens, 5, requires_grad=True), torch.rand(tokens) < 0.8
    routing = router(x, mask=mask)
    expected = specification.load_loss(
        routing.logits, routing.noisy, routing.sigma, k, mask.tolist()
    )
    same_value_and_gradients(balance.load_loss(routing), expected, [x, *router.parameters()])


def test_the_load_loss_pushes_tokens_towards_the_idle_where_counts_have_no_gradient():
    torch.manual_seed(0)
    router = NoisyTopKRouter(4, 4, 1)
    router.weight.data[0] += 1
    x = torch.rand(200, 4)
    before = router(x)
    assert before.load_share[0] > 0.5
    optimizer = torch.optim.SGD(router.parameters(), lr=0.6)
    for _ in range(15):
        optimizer.zero_grad()
        balance.load_loss(router(x)).backward()
        optimizer.step()
    assert router(x).load_share.max() < 0.35


@pytest.mark.parametrize("size", [-20.0, -60.0, -200.0])
def test_the_load_loss_is_finite_even_where_the_learned_noise_has_vanished(size):
    torch.manual_seed(0)
    router = NoisyTopKRouter(4, 4, 2)
    torch.nn.init.constant_(router.noise_weight, size)
    routing = router(torch.rand(5, 4) + 0.5)
    loss = balance.load_loss(routing)
    counts = routing.counts.float()
    torch.testing.assert_close(loss, counts.var() / counts.mean() ** 2)  # each chance is 0 or 1
    for gradient in torch.autograd.grad(loss, list(router.parameters())):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("n_experts", [1, 2, 5, 8])
def test_at_perfect_balance_shares_are_one_and_variations_zero(n_experts):
    routing = certain(5.0 * torch.eye(n_experts).repeat(3, 1))
    assert balance.switch_loss(routing).item() == pytest.approx(1, rel=1e-6)
    assert balance.sequence_loss(routing, seq=n_experts).item() == pytest.approx(1, rel=1e-6)
    assert balance.importance_loss(routing).item() == pytest.approx(0, abs=1e-10)
    noisy = certain(5.0 * torch.eye(n_experts).repeat(3, 1), router=NoisyTopKRouter)
    evened = dataclasses.replace(noisy, noisy=noisy.logits)
    assert balance.load_loss(evened).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("n_experts", [2, 5, 8])
def test_at_collapse_the_auxiliary_loss_is_n_experts(n_experts):
    logits = torch.zeros(7, n_experts)
    logits[:, 1] = 200
    routing = certain(logits)
    assert balance.switch_loss(routing).item() == pytest.approx(n_experts, rel=1e-6)
    assert balance.sequence_loss(routing).item() == pytest.approx(n_experts, rel=1e-6)
    assert balance.importance_loss(routing).item() == pytest.approx(n_experts, rel=1e-6)


def test_the_auxiliary_loss_takes_the_scores_of_all_experts_and_not_of_the_chosen():
    # Two tokens, three experts, k = 1: f = (1, 0, 0), P = (0.6, 0.3, 0.1), so 3 * 0.6.
    routing = certain(torch.tensor([[0.6, 0.3, 0.1]] * 2).log())
    assert balance.switch_loss(routing).item() == pytest.approx(1.8)


def test_the_auxiliary_loss_counts_what_was_asked_for_and_not_what_capacity_served():
    torch.manual_seed(0)
    routing = TopKRouter(4, 6, 2)(torch.randn(30, 4) + 2)
    for overflow in ("drop", "reroute"):
        limited = Capacity(0.5, overflow=overflow)(routing)
        assert not limited.experts.equal(routing.experts)
        for loss in (balance.switch_loss, partial(balance.sequence_loss, seq=10)):
            assert loss(limited).equal(loss(routing))


def test_one_sequence_makes_the_sequence_loss_the_auxiliary_loss():
    routing = TopKRouter(4, 6, 2, score="sigmoid")(torch.randn(12, 4))
    assert_close(balance.sequence_loss(routing), balance.switch_loss(routing))


def test_sequences_balanced_only_together_cost_more_than_their_batch():
    routing = certain(5.0 * torch.eye(2).repeat_interleave(4, dim=0))
    assert balance.switch_loss(routing).item() == pytest.approx(1)
    assert balance.sequence_loss(routing, seq=4).item() > 1.9


def test_the_z_loss_of_equal_logits_is_the_square_of_their_logsumexp():
    routing = certain(torch.full((3, 4), 2.0))
    expected = (2 + torch.tensor(4.0).log()) ** 2
    assert balance.z_loss(routing).item() == pytest.approx(expected.item())


ROUTERS = {
    "top-k": lambda: TopKRouter(4, 6, 2),
    "sigmoid": lambda: TopKRouter(4, 6, 2, score="sigmoid", selection_bias=True),
    "noisy": lambda: NoisyTopKRouter(4, 6, 2),
    "switch": lambda: SwitchRouter(4, 6),
    "gshard": lambda: GShardRouter(4, 6),
    "expert choice": lambda: ExpertChoiceRouter(4, 6, 2),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_padded_batch_costs_what_its_real_tokens_cost(name):
    torch.manual_seed(0)
    router, x = ROUTERS[name]().eval(), torch.randn(12, 4)
    mask = torch.arange(12) % 3 > 0
    x[~mask] = float("nan")
    padded, alone = router(x, mask=mask), router(x[mask])
    losses = [balance.importance_loss, balance.switch_loss, balance.z_loss, balance.sequence_loss]
    for loss in losses + [balance.load_loss] * (name == "noisy"):
        ours, theirs = loss(padded), loss(alone)
        assert_close(ours, theirs)
        for mine, other in zip(
            *(torch.autograd.grad(v, router.weight, retain_graph=True) for v in (ours, theirs))
        ):
            assert_close(mine, other)


@pytest.mark.parametrize("name", ROUTERS)
def test_no_tokens_cost_a_finite_nothing(name):
    router = ROUTERS[name]()
    for mask in (None, torch.zeros(3, dtype=torch.bool)):
        routing = router(torch.zeros(0 if mask is None else 3, 4), mask=mask)
        for loss in (balance.importance_loss, balance.switch_loss, balance.z_loss):
            assert loss(routing) == 0
        assert balance.sequence_loss(routing) == 0


def test_losses_refuse_what_they_cannot_grade():
    routing = TopKRouter(4, 6, 2)(torch.randn(10, 4))
    with pytest.raises(ValueError, match="load_loss needs a NoisyTopKRouter's routing"):
        balance.load_loss(routing)
    with pytest.raises(ValueError, match="seq=3 does not divide the 10 tokens"):
        balance.sequence_loss(routing, seq=3)


@pytest.mark.parametrize("name", balance.LOSSES)
def test_every_loss_of_the_registry_is_called_alike_and_only_one_goes_by_sequences(name):
    torch.manual_seed(0)
    routing, loss = NoisyTopKRouter(4, 6, 2)(torch.randn(12, 4)), balance.LOSSES[name]
    assert isinstance(loss, balance.BalanceLoss)
    assert loss(routing, seq=None).equal(loss(routing))
    assert loss(routing, seq=4).equal(loss(routing)) == (name != "sequence")


def test_sums_are_taken_over_all_layers_for_each_loss_by_itself():
    torch.manual_seed(0)
    routings = [TopKRouter(4, 6, 2)(torch.randn(12, 4)) for _ in range(3)]

    def first(routing, *, seq=None):
        return routing.scores[0, 0] * seq

    losses = balance.resolve({"sequence": 0.1, first: 7.0})
    found = balance.sums(losses, routings, seq=4)
    assert list(found) == ["sequence", "first"]
    torch.testing.assert_close(
        found["sequence"], sum(balance.sequence_loss(routing, seq=4) for routing in routings)
    )
    torch.testing.assert_close(found["first"], 4 * sum(r.scores[0, 0] for r in routings))
    assert {name: coefficient for name, (_, coefficient) in losses.items()} == {
        "sequence": 0.1,
        "first": 7.0,
    }
    assert balance.sums(losses, [], seq=4) == {}


# ----------------------------------------------------------------------------- bias update


@given(sizes(), st.floats(1e-4, 0.5), st.integers(0, 99))
def test_the_bias_of_the_busy_goes_down_and_of_the_idle_up_by_the_rate(shape, rate, seed):
    tokens, n_experts, k = shape
    torch.manual_seed(seed)
    router = TopKRouter(4, n_experts, k, score="sigmoid", selection_bias=True)
    router.bias.copy_(torch.randn(n_experts))
    before = router.bias.tolist()
    routing = router(torch.randn(tokens, 4))
    balance.update_bias(router, routing, rate)
    expected = specification.updated_bias(before, routing.demand.tolist(), rate)
    torch.testing.assert_close(router.bias, torch.tensor(expected))


def test_evaluation_moves_no_bias_and_demand_is_taken_before_capacity():
    torch.manual_seed(0)
    router = TopKRouter(4, 6, 2, selection_bias=True)
    routing = router(torch.randn(30, 4) + 2)
    router.eval()
    balance.update_bias(router, routing)
    assert not router.bias.any()
    router.train()
    balance.update_bias(router, Capacity(0.2)(routing), 0.5)
    assert router.bias.equal(0.5 * (10 - routing.demand.float()).sign())


@pytest.mark.parametrize("make", [TopKRouter, NoisyTopKRouter])
def test_a_router_without_bias_is_refused(make):
    router = make(4, 6, 2)
    with pytest.raises(ValueError, match="selection_bias=True"):
        balance.update_bias(router, router(torch.randn(3, 4)))


def test_repeated_updates_bring_a_skewed_router_to_balance_without_touching_its_weight():
    torch.manual_seed(0)
    router = TopKRouter(8, 8, 2, score="sigmoid", selection_bias=True)
    x = torch.randn(256, 8) + 1.5
    weight = router.weight.clone()
    first = router(x).load_share
    for _ in range(200):
        balance.update_bias(router, router(x), 4e-3)
    last = router(x).load_share
    assert first.max() > 0.3 and first.min() < 0.02
    assert last.max() < 0.14 and last.min() > 0.11
    assert router.weight.equal(weight)


# ------------------------------------------------------------------ activation checkpointing


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputing_activations_changes_no_loss_no_gradient_and_no_bias(use_reentrant):
    layer = make_layer(6, 2)
    layer.router = TopKRouter(8, 6, 2, score="sigmoid", selection_bias=True)
    layer.capacity = Capacity(1.0, overflow="reroute")
    other = copy.deepcopy(layer)
    x = torch.randn(20, 8, requires_grad=True)

    def step(layer, run):
        x.grad = None
        seen = []
        layer.router.register_forward_hook(lambda module, args, routing: seen.append(routing))

        def forward(x):
            y, routing = layer(x)
            balances = [loss(routing) for loss, _ in LOSSES.values()]
            return torch.stack([y.square().mean(), *balances])

        values = run(forward)
        values.sum().backward()
        balance.update_bias(layer.router, seen[0])
        return values, seen, [x.grad, *(p.grad for p in layer.parameters())]

    plain, _, expected = step(layer, lambda forward: forward(x))
    again, seen, recomputed = step(
        other, lambda forward: checkpoint(forward, x, use_reentrant=use_reentrant)
    )
    assert len(seen) == 2  # the router ran twice
    assert seen[0].demand.sum() == seen[1].demand.sum() == 40
    assert again.equal(plain) and other.router.bias.equal(layer.router.bias)
    for ours, theirs in zip(recomputed, expected):
        assert ours.equal(theirs)
