import pytest
import torch

from moe_ref import FeedForward, specification
from moe_ref.ffn import ACTIVATIONS

from .tools import assert_close, gradients, parameters


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_outputs_and_gradients_are_those_of_the_specification(activation, tokens):
    torch.manual_seed(0)
    ffn = FeedForward(6, 10, activation=activation)
    x = torch.randn(tokens, 6, requires_grad=True)
    up, down = parameters(ffn)
    naive = [specification.feed_forward(token, up, down, activation) for token in x]
    expected = torch.stack(naive) if naive else torch.zeros(0, 6)
    assert_close(ffn(x), expected)
    if naive:
        pairs = zip(gradients(ffn(x), x, up, down), gradients(expected, x, up, down))
        for ours, theirs in pairs:
            assert_close(ours, theirs)


def test_clipped_swiglu_holds_large_values_to_seven():
    torch.manual_seed(0)
    ffn, x = FeedForward(6, 10, activation="clipped_swiglu"), 40 * torch.randn(9, 6)
    gate, up = (x @ ffn.gate_up.weight.T).chunk(2, dim=-1)
    assert (gate > 7).any() and (up > 7).any() and (up < -7).any()
    expected = [specification.feed_forward(row, *parameters(ffn), "clipped_swiglu") for row in x]
    assert_close(ffn(x), torch.stack(expected))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_parameters_are_two_or_three_matrices(activation):
    gated, _ = ACTIVATIONS[activation]
    counted = sum(p.numel() for p in FeedForward(6, 10, activation=activation).parameters())
    assert counted == (3 if gated else 2) * 6 * 10


def test_bias_adds_to_both_projections():
    ffn = FeedForward(3, 5, activation="relu", bias=True)
    torch.nn.init.zeros_(ffn.up.weight)
    expected = ffn.down.weight @ ffn.up.bias.relu() + ffn.down.bias
    torch.testing.assert_close(ffn(torch.randn(3)), expected)


def test_leading_axes_are_kept():
    assert FeedForward(4, 8)(torch.randn(2, 3, 5, 4)).shape == (2, 3, 5, 4)


def test_a_feature_size_that_does_not_fit_is_refused_by_the_shape_check():
    with pytest.raises(Exception, match="mat1 and mat2"):
        FeedForward(4, 8)(torch.randn(2, 5))


def test_unknown_activation_and_empty_sizes_are_refused_by_name():
    with pytest.raises(ValueError, match="activation='swish' is none of swiglu, geglu"):
        FeedForward(4, 8, activation="swish")
    with pytest.raises(ValueError, match="d_ff=0 must be at least 1"):
        FeedForward(4, 0)
