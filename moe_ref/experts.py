"""All experts of a layer: their weights stacked, and the ways to multiply by them."""

import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .ffn import activate, check_sizes, is_gated

BACKENDS = ("auto", "loop", "padded", "grouped")


class Experts(nn.Module):
    """n_experts feed-forward blocks, each applied to its own run of rows.

    Args:
        n_experts: how many blocks.
        d_model: features of a row.
        d_ff: hidden features of each block.
        activation: as in `FeedForward`.
        bias: as in `FeedForward`.
        backend: "loop", one matrix product after the other, any dtype; "padded", one batched
            product, every run of rows filled up to the longest; "grouped", torch's grouped_mm, for
            float32, float16 and bfloat16 with d_model and d_ff a multiple of 16 bytes; "auto", the
            loop, but where it applies grouped on a GPU, and on a CPU in bfloat16 with 2 to 16 rows
            for each busy expert (measured in benchmarks/). Under torch.compile grouped is for
            bfloat16, and the loop takes its place for other dtypes.

    `gate_up` is [n_experts, 2 * d_ff, d_model], the rows of the gate first; blocks without a gate
    have `up`, [n_experts, d_ff, d_model]. `down` is [n_experts, d_model, d_ff]. Biases, if any,
    are `gate_up_bias` or `up_bias`, and `down_bias`. Hugging Face models use the same layout.

    Raises:
        ValueError: if a size is below 1, a name is unknown, or the input doesn't fit.
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
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} is none of {', '.join(BACKENDS)}")
        self.n_experts, self.d_model, self.d_ff = n_experts, d_model, d_ff
        self.activation = activation
        self.backend = backend
        gated = is_gated(activation)
        self.into = "gate_up" if gated else "up"
        self._add_projection(self.into, d_model, 2 * d_ff if gated else d_ff, bias)
        self._add_projection("down", d_ff, d_model, bias)

    def _add_projection(self, name: str, inputs: int, outputs: int, bias: bool) -> None:
        """Stacked weights and biases, each expert drawn as nn.Linear draws its own."""
        bound = inputs**-0.5
        weight = torch.empty(self.n_experts, outputs, inputs).uniform_(-bound, bound)
        self.register_parameter(name, nn.Parameter(weight))
        offset = torch.empty(self.n_experts, outputs).uniform_(-bound, bound) if bias else None
        self.register_parameter(f"{name}_bias", None if offset is None else nn.Parameter(offset))

    def forward(
        self, rows: Float[Tensor, "rows d_model"], counts: Int[Tensor, " n_experts"]
    ) -> Float[Tensor, "rows d_model"]:
        """Apply expert e to the next counts[e] rows, for every e in order."""
        if rows.shape[-1] != self.d_model:
            raise ValueError(f"rows have {rows.shape[-1]} features, not d_model={self.d_model}")
        if counts.device.type == "cpu" and counts.sum() != len(rows):  # a GPU would have to wait
            raise ValueError(f"counts sum to {int(counts.sum())}, but there are {len(rows)} rows")
        if torch.is_autocast_enabled(rows.device.type):
            rows = rows.to(torch.get_autocast_dtype(rows.device.type))
        elif rows.dtype != self.down.dtype:
            raise ValueError(f"rows are {rows.dtype}, but the experts are {self.down.dtype}")
        backend = self._backend_for(rows, counts)
        if backend == "loop" and not torch.is_grad_enabled():
            return self._loop(rows, counts)
        project = PROJECTIONS[backend]
        into, into_bias = getattr(self, self.into), getattr(self, f"{self.into}_bias")
        hidden = activate(project(rows, counts, into, into_bias), self.activation)
        return project(hidden, counts, self.down, self.down_bias)

    def _loop(
        self, rows: Float[Tensor, "rows d_model"], counts: Int[Tensor, " n_experts"]
    ) -> Float[Tensor, "rows d_model"]:
        """One block after the other, so that its hidden rows are still in the cache."""
        into, into_bias = getattr(self, self.into), getattr(self, f"{self.into}_bias")
        y = torch.empty_like(rows)
        for e, run, place in runs(counts.tolist(), rows, y):
            hidden = activate(multiply(run, into[e], pick(into_bias, e)), self.activation)
            place.copy_(multiply(hidden, self.down[e], pick(self.down_bias, e)))
        return y

    def _backend_for(self, rows: Tensor, counts: Tensor) -> str:
        fits = (
            rows.dtype in (torch.float32, torch.float16, torch.bfloat16)
            and self.d_model * rows.itemsize % 16 == 0
            and self.d_ff * rows.itemsize % 16 == 0
        )
        if self.backend == "grouped" and not fits:
            raise ValueError(
                f"backend='grouped' takes float32, float16 or bfloat16 and rows of a multiple of "
                f"16 bytes, not {rows.dtype}, d_model={self.d_model}, d_ff={self.d_ff}: use 'loop'"
            )
        # torch.compile knows grouped_mm in bfloat16 only.
        known = rows.dtype == torch.bfloat16 or not torch.compiler.is_compiling()
        if self._wants_grouped(rows, counts) and fits and known:
            return "grouped"
        return "padded" if self.backend == "padded" else "loop"

    def _wants_grouped(self, rows: Tensor, counts: Tensor) -> bool:
        if self.backend != "auto" or rows.is_cuda:
            return self.backend in ("auto", "grouped")
        if torch.compiler.is_compiling():  # the number of rows is not known yet
            return False
        busy = max(1, int((counts > 0).sum()))
        return rows.dtype == torch.bfloat16 and 2 < len(rows) / busy <= 16


def runs(sizes: list[int], *stacked: Tensor) -> Iterator[tuple[Any, ...]]:
    """(e, the rows of expert e in each tensor), for the experts that have rows."""
    parts = zip(*(tensor.split(sizes) for tensor in stacked), strict=True)
    return ((e, *part) for e, part in enumerate(parts) if sizes[e])


def pick(stacked: Tensor | None, e: int) -> Tensor | None:
    return None if stacked is None else stacked[e]


def project_loop(
    rows: Float[Tensor, "rows inputs"],
    counts: Int[Tensor, " n_experts"],
    weight: Float[Tensor, "n_experts outputs inputs"],
    bias: Float[Tensor, "n_experts outputs"] | None,
) -> Float[Tensor, "rows outputs"]:
    """One product after the other."""
    return OneByOne.apply(rows, counts.tolist(), weight, bias)


class OneByOne(torch.autograd.Function):
    """The rows of expert e times weight[e].T, plus bias[e], for one e after the other.

    Autograd, left to itself, would make the gradients of the weights one by one and then stack
    them, the weights' size twice. The backward is made of products of the same kind, and can be
    differentiated again.
    """

    @staticmethod
    def forward(ctx, rows, sizes, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows, weight, bias)
        ctx.sizes = sizes
        y = rows.new_empty(len(rows), weight.shape[1])
        for e, run, place in runs(sizes, rows, y):
            place.copy_(multiply(run, weight[e], pick(bias, e)))
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, weight, bias = ctx.saved_tensors
        by_rows = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_rows = OneByOne.apply(grad, ctx.sizes, weight.mT, None)
        if ctx.needs_input_grad[2]:
            by_weight = RunByRun.apply(grad, ctx.sizes, rows, weight.dtype)
        if ctx.needs_input_grad[3]:
            sums = [run.sum(dim=0) for run in grad.split(ctx.sizes)]
            by_bias = torch.stack(sums).to(bias.dtype)
        return by_rows, None, by_weight, by_bias


class RunByRun(torch.autograd.Function):
    """left[rows of e].T @ right[rows of e] for every e: the gradient of the weights, in place."""

    @staticmethod
    def forward(ctx, left, sizes, right, dtype):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(left, right)
        ctx.sizes = sizes
        shape = len(sizes), left.shape[1], right.shape[1]
        products = torch.empty(shape, dtype=dtype, device=left.device)
        for place, a, b in zip(products, left.split(sizes), right.split(sizes), strict=True):
            if a.dtype == dtype:
                torch.mm(a.T, b, out=place)
            else:
                place.copy_(a.T @ b)
        return products

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        left, right = ctx.saved_tensors
        by_left = OneByOne.apply(right, ctx.sizes, grad, None)
        return by_left, None, OneByOne.apply(left, ctx.sizes, grad.mT, None), None


def multiply(
    rows: Float[Tensor, "rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None,
) -> Float[Tensor, "rows outputs"]:
    """F.linear, with few rows on a CPU by faster ways: `benchmarks/README.md` has the figures.

    A product of few rows is bound by reading the weight. MKL reads it at the speed of memory only
    if it is given a batch of blocks; oneDNN, for one row, at half the speed of torch's own kernel.
    """
    weight, bias = weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)
    few = len(rows) < 64 and rows.device.type == "cpu"
    if not few or torch.compiler.is_compiling():
        return F.linear(rows, weight, bias)
    if rows.dtype == torch.float32 and len(weight) % 4 == 0:
        answers = in_blocks(rows, weight)
    elif rows.dtype == torch.bfloat16 and len(rows) == 1:
        answers = without_onednn(rows, weight)
    else:
        return F.linear(rows, weight, bias)
    return answers if bias is None else answers + bias


def in_blocks(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight.T as a batch of four products, each with a quarter of the outputs."""
    blocks = weight.unflatten(0, (4, -1))
    if 3 <= len(rows) < 16:
        return torch.bmm(rows.expand(4, -1, -1), blocks.mT).transpose(0, 1).flatten(1)
    return torch.bmm(blocks, rows.T.expand(4, -1, -1)).flatten(0, 1).T


_one_at_a_time = threading.Lock()


def without_onednn(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight.T by torch's own kernel; oneDNN has but one switch, for the whole process."""
    with _one_at_a_time:
        before = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        try:
            return F.linear(rows, weight)
        finally:
            torch.backends.mkldnn.enabled = before


def project_padded(
    rows: Float[Tensor, "rows inputs"],
    counts: Int[Tensor, " n_experts"],
    weight: Float[Tensor, "n_experts outputs inputs"],
    bias: Float[Tensor, "n_experts outputs"] | None,
) -> Float[Tensor, "rows outputs"]:
    """One batched product: each run padded with zeros to the longest. One hot expert pads all."""
    n_experts, longest = len(counts), int(counts.max())
    owner = torch.arange(n_experts, device=rows.device).repeat_interleave(counts)
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[owner]
    cell = owner * longest + place  # where each row stands among n_experts * longest
    padded = rows.new_zeros(n_experts * longest, rows.shape[-1]).index_copy(0, cell, rows)
    answers = torch.bmm(padded.view(n_experts, longest, rows.shape[-1]), weight.transpose(-2, -1))
    if bias is not None:
        answers = answers + bias[:, None].to(answers.dtype)
    return answers.flatten(0, 1).index_select(0, cell)


def project_grouped(
    rows: Float[Tensor, "rows inputs"],
    counts: Int[Tensor, " n_experts"],
    weight: Float[Tensor, "n_experts outputs inputs"],
    bias: Float[Tensor, "n_experts outputs"] | None,
) -> Float[Tensor, "rows outputs"]:
    """All matrix products in one call: row i times the weight of the run it lies in."""
    ends = counts.cumsum(0).to(torch.int32)
    weight = weight.to(rows.dtype)  # autocast does that for F.linear, but not for grouped_mm
    answers = F.grouped_mm(rows.contiguous(), weight.transpose(-2, -1), offs=ends)
    if bias is None:
        return answers
    return answers + bias.to(rows.dtype).repeat_interleave(counts, dim=0, output_size=len(rows))


PROJECTIONS = {"loop": project_loop, "padded": project_padded, "grouped": project_grouped}
