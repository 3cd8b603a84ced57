"""`TensorOnly` in the place of the feed-forward block of a transformers model."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moe_ref import Experts, MoELayer, TopKRouter, balance
from moe_ref.layer import TensorOnly
from tests.tools import assert_close

CONFIG = LlamaConfig(
    vocab_size=60,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    attention_dropout=0.0,
    pad_token_id=0,
)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


def with_experts(model: LlamaForCausalLM, n_experts: int, k: int, routings: list) -> None:
    """Every block's MLP becomes a layer whose experts all begin as that MLP."""
    for block in model.model.layers:
        mlp = block.mlp
        experts = Experts(n_experts, 16, 24)
        with torch.no_grad():
            experts.gate_up.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
            experts.down.copy_(mlp.down_proj.weight)
        block.mlp = TensorOnly(MoELayer(TopKRouter(16, n_experts, k), experts), routings.append)


def test_experts_that_are_all_the_mlp_leave_the_logits_of_llama_as_they_were():
    tokens = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = llama()(tokens).logits
    model, routings = llama(), []
    with_experts(model, 4, 2, routings)
    assert_close(model(tokens).logits, expected)
    assert [len(routing.mask) for routing in routings] == [18, 18]


def test_a_llama_with_experts_is_trained_by_its_own_loss_and_a_balance_loss():
    model, routings = llama(), []
    with_experts(model, 4, 2, routings)
    tokens = torch.randint(1, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        routings.clear()
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        (loss + 0.01 * sum(balance.switch_loss(routing) for routing in routings)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
    layer = model.model.layers[0].mlp.layer
    assert not layer.experts.down[0].equal(layer.experts.down[1])  # they went their own ways
