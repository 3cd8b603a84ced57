"""Weights in 8 or 4 bits: whole numbers, and a scale for each group of neighbours in a row.

    s = max|w| / (2^(bits - 1) - 1)        q = round(w / s)        y = x (s q)^T

`quantise` takes `Experts`, `quantise_model` a whole model. Products decode a tile of one matrix at
a time, so that no copy of all weights is ever there, forward or backward. Gradients flow to the
input; quantised weights have none.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ._validate import check_choice
from .experts import Experts, sizes_of
from .ffn import activate, autocast_dtype
from .kernels.quantised import Bits, QuantisedWeight, product

Model = TypeVar("Model", bound=nn.Module)
Plan = Mapping[str, tuple[Bits, int]]  # bits and group of parts of a model, by their names


def quantise(experts: Experts, bits: Bits = 8, group: int = 32) -> "QuantisedExperts":
    """The same experts with quantised weights; their biases stay as they are.

    Args:
        experts: stay as they are.
        bits: 8 or 4, of all experts, or a list with the bits of each.
        group: neighbouring inputs of a row that share a scale; the last group of a row may be
            shorter. At least the number of inputs: a scale for each row.

    Raises:
        ValueError: if bits are neither 8 nor 4, group is below 1, or a weight is NaN or infinite.

    Example:
        >>> experts, rows, counts = Experts(2, d_model=64, d_ff=96), torch.randn(5, 64), [2, 3]
        >>> small = quantise(experts, bits=4)
        >>> small.nbytes, sum(weight.nbytes for weight in experts.parameters())
        (23040, 147456)
        >>> gap = small(rows, torch.tensor(counts)) - experts(rows, torch.tensor(counts))
        >>> bool(gap.abs().max() < 0.1)
        True

    Source: scales by the largest absolute value: Dettmers et al. 2022 (2208.07339), section 2;
    groups: Yao et al. 2022 (2206.01861).
    """
    return QuantisedExperts(experts, bits, group)


def quantise_model(
    model: Model,
    bits: int | Sequence[Sequence[int]] = 8,
    group: int = 32,
    *,
    which: str = "experts",
) -> Model:
    """A copy of a model with quantised weights; nothing else of it differs.

    Args:
        model: stays as it is.
        bits: 8 or 4, or for each `Experts` of the model, in order, a list with the bits of each
            expert; other matrices then get the most that any expert has.
        group: as in `quantise`.
        which: "experts", or "all": every matrix that multiplies, which leaves out routers, the
            embedding, and a head tied to it.

    Raises:
        ValueError: if there is nothing to quantise, or as in `quantise`, with the place.

    Example:
        >>> model = Transformer(TransformerConfig(50, 32, 2, 4, d_ff=64, n_experts=4))
        >>> small = quantise_model(model, bits=4)
        >>> small(torch.tensor([[3, 1, 4]])).logits.shape, nbytes(model) / nbytes(small) > 2
        (torch.Size([1, 3, 50]), True)
    """
    check_choice("which", which, ("experts", "all"))
    stacks = [name for name, part in model.named_modules() if isinstance(part, Experts)]
    plan: dict[str, tuple[Bits, int]] = {name: (bits, group) for name in stacks}  # type: ignore
    if not isinstance(bits, int):
        if len(bits) != len(stacks):
            raise ValueError(f"bits has {len(bits)} lists, but the model has {len(stacks)} Experts")
        plan = {name: (each, group) for name, each in zip(stacks, bits, strict=True)}
    if which == "all":
        most = bits if isinstance(bits, int) else max(max(each) for each in bits)
        kept = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
        for name, part in model.named_modules():
            if isinstance(part, nn.Linear) and id(part.weight) not in kept:
                plan[name] = (most, group)
    if not plan:
        raise ValueError(f"which={which!r}: the model has none to quantise")
    return replaced(model, plan)


def replaced(model: Model, plan: Plan) -> Model:
    """A copy of a model in which some parts are quantised: bits and group by the part's name."""
    new: dict[int, Any] = {}  # what deepcopy is to take in place of a copy
    for name, (bits, group) in plan.items():
        try:
            part = model.get_submodule(name)
        except AttributeError:
            part = None
        kind = next((ours for theirs, ours in KINDS.items() if isinstance(part, theirs)), None)
        if kind is None:
            raise ValueError(f"{name} is no Experts or Linear of the model")
        try:
            new[id(part)] = kind(part, bits, group)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name else str(error)) from error
    return copy.deepcopy(model, new)


def plan_of(model: nn.Module) -> Plan:
    """Bits and group of each quantised part of a model, by its name: what `replaced` takes."""
    kinds = tuple(KINDS.values())
    return {
        name: (part.bits[0] if len({*part.bits}) == 1 else list(part.bits), part.group)
        for name, part in model.named_modules()
        if isinstance(part, kinds)
    }


def nbytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of a module; what is tied counts once.

    Example:
        >>> nbytes(nn.Linear(8, 4)), nbytes(QuantisedLinear(nn.Linear(8, 4)))
        (144, 64)
    """
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@torch.no_grad()
def errors(experts: Experts, quantised: "QuantisedExperts") -> Float[Tensor, " n_experts"]:
    """Relative error of each expert: the norm of what its weights lost, over their own norm.

    Example:
        >>> experts = Experts(3, d_model=64, d_ff=64)
        >>> (errors(experts, quantise(experts, bits=[8, 4, 4])) > 0.01).tolist()
        [False, True, True]
    """
    found = []
    for e in range(experts.n_experts):
        lost = whole = 0.0
        for weight, held in zip((experts.input_weight, experts.down), quantised.weights):
            theirs = weight[e].double()
            lost += float((held.decode(e) - theirs).square().sum())
            whole += float(theirs.square().sum())
        found.append((lost / whole) ** 0.5 if whole else 0.0)
    return torch.tensor(found)


class QuantisedExperts(nn.Module):
    """`Experts` with quantised weights: made by `quantise`, called like them.

    Rows of any dtype are multiplied in that dtype; `.to(dtype)` changes scales and biases.

    Args:
        experts, bits, group: as in `quantise`.

    Raises:
        ValueError: as `quantise` does; in the call, if the rows don't fit.

    Example:
        >>> QuantisedExperts(Experts(2, d_model=4, d_ff=8), bits=[8, 4])
        QuantisedExperts(
          n_experts=2, d_model=4, d_ff=8, activation=swiglu
          (gate_up): QuantisedWeight(matrices=2, outputs=16, inputs=4, bits=6.0 (mean), group=32)
          (down): QuantisedWeight(matrices=2, outputs=4, inputs=8, bits=6.0 (mean), group=32)
        )
    """

    down: QuantisedWeight
    down_bias: Tensor | None

    def __init__(self, experts: Experts, bits: Bits = 8, group: int = 32) -> None:
        super().__init__()
        self.n_experts, self.d_model, self.d_ff = experts.n_experts, experts.d_model, experts.d_ff
        self.activation = experts.activation
        self.training, self._input = experts.training, experts._input
        for name, weight in ((self._input, experts.input_weight), ("down", experts.down)):
            setattr(self, name, QuantisedWeight(weight, bits, group, name=name))
            self.register_parameter(f"{name}_bias", _copied(getattr(experts, f"{name}_bias")))
        self.bits, self.group = self.down.bits, group

    @property
    def weights(self) -> tuple[QuantisedWeight, QuantisedWeight]:
        """Of both projections."""
        return getattr(self, self._input), self.down

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and biases."""
        return nbytes(self)

    def forward(
        self, rows: Float[Tensor, "rows d_model"], counts: Int[Tensor, " n_experts"]
    ) -> Float[Tensor, "rows d_model"]:
        """Apply expert e to the next counts[e] rows, for every e in order."""
        if rows.shape[-1] != self.d_model:
            raise ValueError(f"rows have {rows.shape[-1]} features, not d_model={self.d_model}")
        rows = rows.to(autocast_dtype(rows) or rows.dtype)
        sizes = sizes_of(counts, rows)
        if not torch.compiler.is_compiling() and sum(sizes) != len(rows):
            raise ValueError(f"counts sum to {sum(sizes)}, but there are {len(rows)} rows")
        (first, second), bias = self.weights, getattr(self, f"{self._input}_bias")
        hidden = activate(product(rows, sizes, first, bias), self.activation)
        return product(hidden, sizes, second, self.down_bias)

    @torch.no_grad()
    def dequantise(self) -> Experts:
        """Ordinary experts with the weights that these stand for, in the dtype of the scales."""
        sizes, bias = (self.n_experts, self.d_model, self.d_ff), self.down_bias is not None
        with torch.device("meta"):  # draws no random numbers
            experts = Experts(*sizes, activation=self.activation, bias=bias)
        scales = self.down.scales
        experts.to(scales.dtype).to_empty(device=scales.device).train(self.training)
        for name, held in zip((self._input, "down"), self.weights):
            for e, weight in enumerate(getattr(experts, name)):
                weight.copy_(held.decode(e))
            if bias:
                getattr(experts, f"{name}_bias").copy_(getattr(self, f"{name}_bias"))
        return experts

    def extra_repr(self) -> str:
        sizes = f"n_experts={self.n_experts}, d_model={self.d_model}, d_ff={self.d_ff}"
        bias = "" if self.down_bias is None else ", bias=True"
        return f"{sizes}, activation={self.activation}{bias}"


class QuantisedLinear(nn.Module):
    """An `nn.Linear` with a quantised weight; its bias stays as it is.

    Args:
        linear: stays as it is.
        bits, group: as in `quantise`.

    Example:
        >>> QuantisedLinear(nn.Linear(64, 3), bits=4)(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 3])
    """

    bias: Tensor | None

    def __init__(self, linear: nn.Linear, bits: Bits = 8, group: int = 32) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.training = linear.training
        self.weight = QuantisedWeight(linear.weight[None], bits, group)
        self.register_parameter("bias", _copied(linear.bias))
        self.bits, self.group = self.weight.bits, group

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        rows = x.reshape(-1, self.in_features).to(autocast_dtype(x) or x.dtype)
        bias = None if self.bias is None else self.bias[None]
        return product(rows, [len(rows)], self.weight, bias).unflatten(0, x.shape[:-1])


KINDS: Mapping[type, Any] = {Experts: QuantisedExperts, nn.Linear: QuantisedLinear}


def _copied(parameter: nn.Parameter | None) -> nn.Parameter | None:
    return None if parameter is None else nn.Parameter(parameter.detach().clone())
