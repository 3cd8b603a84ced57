"""The balance losses against those of transformers, with their normalisation accounted for."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from moe_ref import Routing, SwitchRouter, TopKRouter, balance
from tests.tools import assert_close

SHAPES = [(2, 8, 2, 40), (3, 64, 8, 100), (1, 5, 1, 7)]  # layers, n_experts, k, tokens


def layers_of(n_layers, n_experts, k, tokens, seed, mask=None):
    """Routings of several layers, their routers' weights, and the logits that transformers asks."""
    torch.manual_seed(seed)
    routers = [TopKRouter(16, n_experts, k) for _ in range(n_layers)]
    inputs = [torch.randn(tokens, 16) + torch.randn(16) for _ in range(n_layers)]
    routings = [router(x, mask=mask) for router, x in zip(routers, inputs)]
    logits = tuple(x @ router.weight.T for router, x in zip(routers, inputs))
    return routings, [router.weight for router in routers], logits


def pooled(routings):
    """All layers as if they were one, with the tokens of all."""
    fields = ("experts", "weights", "logits", "scores", "mask")
    joined = {name: torch.cat([getattr(r, name) for r in routings]) for name in fields}
    return Routing(**joined, demand=sum(r.demand for r in routings))


def same(ours, theirs, leaves):
    assert_close(ours, theirs)
    for mine, other in zip(
        *(torch.autograd.grad(value, leaves, retain_graph=True) for value in (ours, theirs))
    ):
        assert_close(mine, other)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_of_transformers_is_k_times_ours_over_layers_pooled(shape, padded, seed):
    n_layers, n_experts, k, tokens = shape
    mask = torch.arange(tokens) % 3 > 0 if padded else None
    routings, weights, logits = layers_of(*shape, seed, mask)
    attention_mask = None if mask is None else mask.long()[None]
    theirs = load_balancing_loss_func(logits, n_experts, k, attention_mask)
    same(k * balance.switch_loss(pooled(routings)), theirs, weights)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_for_one_layer_it_is_k_times_ours(seed):
    (routing,), weights, logits = layers_of(1, 16, 4, 50, seed)
    same(4 * balance.switch_loss(routing), load_balancing_loss_func(logits, 16, 4), weights)


def test_pooling_hides_two_layers_that_have_collapsed_onto_different_experts():
    """Each layer sends all tokens to one expert, the worst there is: 2 by Fedus et al., eq. 4.

    transformers reports the 1 of perfect balance, because it adds the layers up first.
    """
    first = torch.tensor([[50.0, 0.0]]).repeat(10, 1)
    logits = (first, first.flip(-1))
    assert load_balancing_loss_func(logits, 2, 1).item() == pytest.approx(1)
    router = TopKRouter(2, 2, 1)
    torch.nn.init.eye_(router.weight)
    for layer in logits:
        assert balance.switch_loss(router(layer)).item() == pytest.approx(2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_losses_of_switch_transformers_are_ours_by_sequence(seed):
    torch.manual_seed(seed)
    router = SwitchRouter(16, 8)
    routing = router(torch.randn(60, 16) + torch.randn(16))
    logits = routing.logits.view(4, 15, 8)
    theirs = switch.load_balancing_loss_func(logits.softmax(dim=-1), routing.experts.view(4, 15))
    weight = [router.weight]
    same(balance.sequence_loss(routing, seq=15), theirs, weight)
    same(balance.z_loss(routing), switch.router_z_loss_func(logits), weight)
