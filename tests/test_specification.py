"""The naive specifications against closed forms."""

import pytest
import torch

from moe_ref import specification


def test_activations_are_those_of_their_definitions_at_known_points():
    one = torch.tensor(1.0)
    assert specification.gelu(one).item() == pytest.approx(0.8413447, abs=1e-6)
    assert specification.silu(one).item() == pytest.approx(0.7310586, abs=1e-6)  # 1 / (1 + 1/e)
    assert specification.relu(torch.tensor([-1.0, 0.0, 2.0])).tolist() == [0, 0, 2]


def test_top_k_gives_the_worked_token_its_experts_and_weights():
    scores = torch.tensor([[0.05, 0.61, 0.09, 0.25]])
    (pairs,) = specification.top_k(scores.log(), torch.eye(4), k=2).slots
    assert [expert for expert, _ in pairs] == [1, 3]
    assert [weight.item() for _, weight in pairs] == pytest.approx([0.61 / 0.86, 0.25 / 0.86])
    (raw,) = specification.top_k(scores.log(), torch.eye(4), k=1, renormalize=False).slots
    assert [(expert, weight.item()) for expert, weight in raw] == [(1, pytest.approx(0.61))]


def test_largest_gives_ties_to_the_lower_index():
    assert specification.largest([1.0, 3.0, 3.0, 2.0, 3.0], 4) == [1, 2, 4, 3]


def test_a_layer_of_identical_experts_is_the_dense_block_whatever_the_router():
    torch.manual_seed(0)
    x, up, down = torch.randn(5, 4), torch.randn(6, 4), torch.randn(4, 3)
    decision = specification.top_k(x, torch.randn(7, 4), k=3)
    y = specification.moe(x, decision, up.expand(7, 6, 4), down.expand(7, 4, 3))
    dense = torch.stack([specification.feed_forward(token, up, down) for token in x])
    torch.testing.assert_close(y, dense)
