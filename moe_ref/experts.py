"""All experts of a layer: their weights stacked, and the backends that multiply by them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ._validate import check_choice, check_sizes
from .ffn import activate, autocast_dtype, is_gated
from .kernels import cpu
from .kernels.grouped_linear import GroupedLinear, of


class Experts(nn.Module):
    """n_experts feed-forward blocks, each applied to its own run of rows.

    The parameters are laid out as in Hugging Face models: `gate_up` [n_experts, 2 * d_ff, d_model],
    the rows of the gate first, or without a gate `up` [n_experts, d_ff, d_model]; and `down`
    [n_experts, d_model, d_ff]. Biases have the same names with `_bias` at the end.

    | backend | how | takes |
    |---|---|---|
    | loop | one expert after the other | any dtype |
    | padded | one batched product, every run of rows filled up to the longest | any dtype |
    | grouped | torch's grouped_mm | 16 or 32 bits, rows of a multiple of 16 bytes |
    | auto | the fastest of the others, by a measured rule | any dtype |

    Args:
        n_experts: how many blocks.
        d_model: features of a row.
        d_ff: hidden features of each block.
        activation: as in `FeedForward`.
        bias: whether each projection adds one.
        backend: a name in the table above.

    Raises:
        ValueError: if a size is below 1 or a name is unknown; in the call, if the rows don't fit.

    Example:
        >>> experts = Experts(n_experts=3, d_model=4, d_ff=8)
        >>> rows = torch.randn(5, 4)  # two rows for expert 0, none for 1, three for 2
        >>> experts(rows, torch.tensor([2, 0, 3])).shape
        torch.Size([5, 4])
    """

    down: Tensor
    down_bias: Tensor | None

    def __init__(
        self,
        n_experts: int,
        d_model: int,
        d_ff: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes(n_experts=n_experts, d_model=d_model, d_ff=d_ff)
        check_choice("backend", backend, ["auto", *BACKENDS])
        self.n_experts, self.d_model, self.d_ff = n_experts, d_model, d_ff
        self.activation, self.backend = activation, backend
        self._input = "gate_up" if is_gated(activation) else "up"
        hidden = 2 * d_ff if is_gated(activation) else d_ff
        for name, outputs, inputs in ((self._input, hidden, d_model), ("down", d_model, d_ff)):
            self.register_parameter(name, nn.Parameter(torch.empty(n_experts, outputs, inputs)))
            offset = nn.Parameter(torch.empty(n_experts, outputs)) if bias else None
            self.register_parameter(f"{name}_bias", offset)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each expert's weights and biases as nn.Linear draws its own."""
        for name, inputs in ((self._input, self.d_model), ("down", self.d_ff)):
            for parameter in (getattr(self, name), getattr(self, f"{name}_bias")):
                if parameter is not None:
                    nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5)

    @property
    def input_weight(self) -> Float[Tensor, "n_experts hidden d_model"]:
        """The first projection of all experts: `gate_up`, or `up` without a gate."""
        return getattr(self, self._input)

    @property
    def input_bias(self) -> Float[Tensor, "n_experts hidden"] | None:
        """Its bias, if it has one."""
        return getattr(self, f"{self._input}_bias")

    def forward(
        self, rows: Float[Tensor, "rows d_model"], counts: Int[Tensor, " n_experts"]
    ) -> Float[Tensor, "rows d_model"]:
        """Apply expert e to the next counts[e] rows, for every e in order."""
        rows = rows.to(autocast_dtype(rows) or rows.dtype)
        self._check(rows, counts)
        return BACKENDS[self._choose(rows, counts)].run(rows, counts, self)

    def _check(self, rows: Tensor, counts: Tensor) -> None:
        if rows.shape[-1] != self.d_model:
            raise ValueError(f"rows have {rows.shape[-1]} features, not d_model={self.d_model}")
        # The host would have to wait for a GPU's sum, and a graph has none yet.
        known = counts.device.type == "cpu" and not torch.compiler.is_compiling()
        if known and (total := int(counts.sum())) != len(rows):
            raise ValueError(f"counts sum to {total}, but there are {len(rows)} rows")
        if autocast_dtype(rows) is None and rows.dtype != self.down.dtype:
            raise ValueError(f"rows are {rows.dtype}, but the experts are {self.down.dtype}")

    def _choose(self, rows: Tensor, counts: Tensor) -> str:
        """The backend asked for, or what "auto" means for these rows."""
        if self.backend == "auto":
            return auto_backend(rows, counts, self)
        if self.backend == "grouped" and (torch.compiler.is_compiling() or rows.is_meta):
            # torch.compile and the meta device know grouped_mm in bfloat16 only.
            return "grouped" if rows.dtype == torch.bfloat16 else "loop"
        backend = BACKENDS[self.backend]
        if not backend.supports(rows, self):
            raise ValueError(
                f"backend={self.backend!r} takes {backend.takes}, not {rows.dtype},"
                f" d_model={self.d_model}, d_ff={self.d_ff}: use 'loop'"
            )
        return self.backend

    def extra_repr(self) -> str:
        sizes = f"n_experts={self.n_experts}, d_model={self.d_model}, d_ff={self.d_ff}"
        bias = "" if self.down_bias is None else ", bias=True"
        return f"{sizes}, activation={self.activation}{bias}, backend={self.backend}"


# On a CPU, grouped_mm beats the loop with at most so many rows for each busy expert: measured by
# `python benchmarks/layer.py`, and for small weights by `python benchmarks/decode.py`.
AUTO_GROUPED = {torch.bfloat16: 16, torch.float32: 64}
AUTO_LOOP = 3  # float32 rows that the loop takes anyway
AUTO_PADDED = 4  # bfloat16 rows that may be multiplied for each that there is


def auto_backend(rows: Tensor, counts: Tensor, experts: Experts) -> str:
    """The name of the fastest backend for these rows.

    A product with a small weight takes less time than to start it. In float32 grouped_mm is then
    faster, but the loop has the better gradients; in bfloat16 one padded product is fastest, unless
    one expert is so busy that most of it would be padding.
    """
    if not supports_grouped(rows, experts):
        return "loop"
    if torch.compiler.is_compiling():  # no counts yet, and grouped_mm in bfloat16 only
        return "grouped" if rows.is_cuda and rows.dtype == torch.bfloat16 else "loop"
    if rows.device.type != "cpu" or rows.dtype not in AUTO_GROUPED:
        return "grouped" if rows.is_cuda else "loop"
    small = experts.input_weight[0].numel() < cpu.LARGE
    if rows.dtype == torch.float32:
        if torch.is_grad_enabled() or not small or len(rows) <= AUTO_LOOP:
            return "loop"
    elif small and experts.n_experts * int(counts.max()) <= AUTO_PADDED * len(rows):
        return "padded"
    busy = int((counts > 0).sum())
    return "grouped" if len(rows) <= busy * AUTO_GROUPED[rows.dtype] else "loop"


# ---------------------------------------------------------------- the loop


def run_loop(
    rows: Float[Tensor, "rows d_model"], counts: Int[Tensor, " n_experts"], experts: Experts
) -> Float[Tensor, "rows d_model"]:
    """One expert after the other."""
    sizes = sizes_of(counts, rows)
    w_in, b_in, w_out, b_out = weights_of(experts)
    if torch.compiler.is_compiling():
        hidden = activate(plain_loop(rows, sizes, w_in, b_in), experts.activation)
        return plain_loop(hidden, sizes, w_out, b_out)
    if torch.is_grad_enabled():
        hidden = activate(GroupedLinear.apply(rows, sizes, w_in, b_in), experts.activation)
        return GroupedLinear.apply(hidden, sizes, w_out, b_out)
    y, start = torch.empty_like(rows), 0
    for e, size in enumerate(sizes):
        if size:  # both products of an expert at once: its hidden rows are in the CPU's cache
            run = rows.narrow(0, start, size)
            hidden = activate(cpu.linear(run, w_in[e], of(b_in, e)), experts.activation)
            y.narrow(0, start, size).copy_(cpu.linear(hidden, w_out[e], of(b_out, e)))
            start += size
    return y


def plain_loop(rows: Tensor, sizes: list[Any], weight: Tensor, bias: Tensor | None) -> Tensor:
    """One projection, for a graph, which makes its own backward."""
    runs = rows.split(sizes)
    y = torch.cat([F.linear(run, weight[e], of(bias, e)) for e, run in enumerate(runs)])
    torch._check(y.shape[0] == rows.shape[0])  # torch.export can't tell what the sizes sum to
    return y


# ---------------------------------------------------------------- padded and grouped


def run_padded(
    rows: Float[Tensor, "rows d_model"], counts: Int[Tensor, " n_experts"], experts: Experts
) -> Float[Tensor, "rows d_model"]:
    """One batched product, every run padded with zeros to the longest, however long that is."""
    longest = max(sizes_of(counts, rows))
    starts = counts.cumsum(0) - counts
    place = torch.arange(longest, device=rows.device)
    empty = place >= counts[:, None]  # n_experts by longest
    source = (starts[:, None] + place).masked_fill(empty, 0).flatten()
    padded = rows.index_select(0, source).unflatten(0, empty.shape)

    def project(runs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.bmm(runs, weight.mT)
        return y if bias is None else y + bias[:, None].to(y.dtype)

    w_in, b_in, w_out, b_out = weights_of(experts)
    hidden = project(padded.masked_fill(empty[..., None], 0), w_in, b_in)
    y = project(activate(hidden, experts.activation), w_out, b_out)
    # Where each row lies in y: its place in its run, every run being `longest` places long.
    owner = torch.arange(len(counts), device=rows.device)
    owner = owner.repeat_interleave(counts, output_size=len(rows))
    cell = torch.arange(len(rows), device=rows.device) - starts[owner] + owner * longest
    return y.flatten(0, 1).index_select(0, cell)


def run_grouped(
    rows: Float[Tensor, "rows d_model"], counts: Int[Tensor, " n_experts"], experts: Experts
) -> Float[Tensor, "rows d_model"]:
    """All products of a projection in one call of torch's grouped_mm."""
    ends = counts.cumsum(0).to(torch.int32)

    def project(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.to(rows.dtype)  # as autocast does for F.linear alone
        y = F.grouped_mm(rows.contiguous(), weight.mT, offs=ends)
        if bias is None:
            return y
        return y + bias.to(rows.dtype).repeat_interleave(counts, dim=0, output_size=len(rows))

    w_in, b_in, w_out, b_out = weights_of(experts)
    return project(activate(project(rows, w_in, b_in), experts.activation), w_out, b_out)


def supports_grouped(rows: Tensor, experts: Experts) -> bool:
    """Whether grouped_mm takes rows of this dtype and these widths."""
    return (
        rows.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and experts.d_model * rows.itemsize % 16 == 0
        and experts.d_ff * rows.itemsize % 16 == 0
    )


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Backend:
    """One way to apply every expert to its rows: the whole block, so that a fused kernel fits.

    Attributes:
        run: `run(rows, counts, experts)` gives the outputs of rows that lie in expert order.
        takes: what rows it takes, in words.
        supports: `supports(rows, experts)`: whether these are such rows.

    Example:
        >>> experts, rows = Experts(2, d_model=4, d_ff=8), torch.randn(3, 4)
        >>> loop, padded = (BACKENDS[name].run for name in ("loop", "padded"))
        >>> counts = torch.tensor([1, 2])
        >>> torch.allclose(loop(rows, counts, experts), padded(rows, counts, experts), atol=1e-6)
        True
    """

    run: Callable[[Tensor, Tensor, Experts], Tensor]
    takes: str = "any rows"
    supports: Callable[[Tensor, Experts], bool] = lambda rows, experts: True


BACKENDS: Mapping[str, Backend] = {
    "loop": Backend(run_loop),
    "padded": Backend(run_padded),
    "grouped": Backend(
        run_grouped,
        "float32, float16 or bfloat16 and rows of a multiple of 16 bytes",
        supports_grouped,
    ),
}


def weights_of(experts: Experts) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Weight and bias of both projections."""
    return experts.input_weight, experts.input_bias, experts.down, experts.down_bias


def sizes_of(counts: Tensor, rows: Tensor) -> list[Any]:
    """The counts as numbers; symbols in torch.export; any that fit on the meta device."""
    if counts.is_meta:
        return [len(rows)] + [0] * (len(counts) - 1)
    return counts.tolist()
