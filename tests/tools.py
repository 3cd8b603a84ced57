"""What several test files need: measures of closeness, gradients, and layers of random shape."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from moe_ref import Experts, FeedForward, MoELayer, TopKRouter
from moe_ref.specification import Decision


def assert_close(
    ours: Tensor, theirs: Tensor, *, relative: float = 1e-5, floor: float = 0.0
) -> None:
    """Largest difference under `relative` times the largest value of `theirs`.

    `floor` is the least such value: a gradient that is zero in theory is all rounding.
    """
    assert ours.shape == theirs.shape
    assert ours.isfinite().all()
    if ours.numel():
        scale = max(theirs.double().abs().max().item(), floor)
        gap = (ours.double() - theirs.double()).abs().max().item()
        assert gap <= relative * scale, f"differs by {gap:.2e}, largest value {scale:.2e}"


def gradients(y: Tensor, *leaves: Tensor) -> list[Tensor]:
    """d(loss)/d(leaf) for a loss that weighs every output differently; None becomes zeros."""
    torch.manual_seed(1)
    loss = (y * torch.randn(y.shape, dtype=torch.float64).to(y)).sum()  # the same for every dtype
    return list(torch.autograd.grad(loss, leaves, materialize_grads=True))


def make_layer(
    n_experts: int = 4,
    k: int = 2,
    *,
    d_model: int = 8,
    d_ff: int = 12,
    renormalize: bool = True,
    activation: str = "swiglu",
    backend: str = "auto",
    shared: bool = False,
    seed: int = 0,
) -> MoELayer:
    torch.manual_seed(seed)
    return MoELayer(
        TopKRouter(d_model, n_experts, k, renormalize=renormalize),
        Experts(n_experts, d_model, d_ff, activation=activation, backend=backend),
        shared=FeedForward(d_model, d_ff, activation=activation) if shared else None,
    )


def parameters(module: nn.Module) -> list[Tensor]:
    return list(module.parameters())


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    """(tokens, n_experts, k), with no token, one token, one expert and k = n_experts among them."""
    n_experts = draw(st.integers(1, 9))
    return draw(st.integers(0, 17)), n_experts, draw(st.integers(1, n_experts))


def assert_decided(routing, decision: Decision, *, demand: list[int] | None = None) -> None:
    """Same experts in the same slots, same weights, logits, scores and demand."""
    assert len(routing.experts) == len(decision.slots)
    nobody = (decision.n_experts, torch.zeros(()))
    width = routing.experts.shape[1]
    full = [slots + [nobody] * (width - len(slots)) for slots in decision.slots]
    assert routing.experts.tolist() == [[expert for expert, _ in slots] for slots in full]
    assert routing.demand.tolist() == (decision.demand if demand is None else demand)
    assert routing.mask.tolist() == decision.mask
    for t in decision.real:
        assert_close(routing.weights[t], torch.stack([w for _, w in full[t]]))
        assert_close(routing.logits[t], decision.logits[t], floor=0.1)
        assert_close(routing.scores[t], decision.scores[t])


def weight_gradients(routing, decision: Decision, leaves: Sequence[Tensor]):
    """Gradients of one weighted sum of all slot weights: of the routing, and of the decision."""
    torch.manual_seed(1)
    factors = torch.randn_like(routing.weights)
    ours = (routing.weights * factors).sum()
    theirs = sum(
        (
            factors[t, s] * weight
            for t, slots in enumerate(decision.slots)
            for s, (_, weight) in enumerate(slots)
        ),
        start=torch.zeros(()),
    )
    ours, theirs = (value + 0 * sum(leaf.sum() for leaf in leaves) for value in (ours, theirs))
    return torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)
