"""The dense feed-forward block: what a transformer layer has, and what every expert is."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ._validate import check_choice, check_sizes
from .kernels.cpu import Linear


def clipped_swiglu(gate: Float[Tensor, "*rows d_ff"], up: Float[Tensor, "*rows d_ff"]) -> Tensor:
    """gate * sigmoid(1.702 gate) * (up + 1), gate at most 7 and up within 7 of 0: gpt-oss's."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


# name: (gated, the function applied): of gate and up where there are both, else of up alone.
ACTIVATIONS: dict[str, tuple[bool, Callable[..., Tensor]]] = {
    "swiglu": (True, lambda gate, up: F.silu(gate) * up),
    "geglu": (True, lambda gate, up: F.gelu(gate) * up),
    "clipped_swiglu": (True, clipped_swiglu),
    "gelu": (False, F.gelu),
    "relu": (False, F.relu),
    "silu": (False, F.silu),
}


class FeedForward(nn.Module):
    """y = down(act(up(x))), or with a gate y = down(act(gate(x)) * up(x)).

    A gated block has both input projections in `gate_up`, weight [2 * d_ff, d_model], the rows of
    the gate first; an ungated one has `up`, weight [d_ff, d_model].

    Args:
        d_model: features of a token.
        d_ff: hidden features.
        activation: "swiglu", "geglu" or "clipped_swiglu" (gated), "gelu" (exact, by erf), "relu"
            or "silu".
        bias: whether each projection adds one.

    Raises:
        ValueError: if a size is below 1 or the activation is unknown.

    Example:
        >>> block = FeedForward(d_model=4, d_ff=6)
        >>> block(torch.randn(2, 3, 4)).shape
        torch.Size([2, 3, 4])

    Source: Vaswani et al. 2017, section 3.3; gated forms: Shazeer 2020 (2002.05202); clipped:
    OpenAI 2025 (2508.10925), section 2.2.
    """

    def __init__(
        self, d_model: int, d_ff: int, *, activation: str = "swiglu", bias: bool = False
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, d_ff=d_ff)
        self.d_model, self.d_ff = d_model, d_ff
        self.activation = activation
        if is_gated(activation):
            self.gate_up = Linear(d_model, 2 * d_ff, bias=bias)
        else:
            self.up = Linear(d_model, d_ff, bias=bias)
        self.down = Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        hidden = self.gate_up(x) if is_gated(self.activation) else self.up(x)
        return self.down(activate(hidden, self.activation))

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_ff={self.d_ff}, activation={self.activation}"


def activate(hidden: Float[Tensor, "... hidden"], activation: str) -> Float[Tensor, "... d_ff"]:
    """Apply an activation; a gated one takes [gate, up] side by side and halves the width."""
    gated, function = ACTIVATIONS[activation]
    if not gated:
        return function(hidden)
    return function(*hidden.chunk(2, dim=-1))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of torch.autocast on the device of x; None without it, and on the meta device."""
    kind = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def is_gated(activation: str) -> bool:
    """Whether an activation multiplies two projections; ValueError if the name is unknown."""
    check_choice("activation", activation, ACTIVATIONS)
    return ACTIVATIONS[activation][0]
