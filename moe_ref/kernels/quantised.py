"""Matrices in 8 or 4 bits: how they are held, and products that decode a tile of one at a time."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn

from .._validate import check_sizes
from .cpu import linear

Bits = int | Sequence[int]
TILE = 2**20  # numbers that are decoded at a time: measured by `python benchmarks/quantise.py`
FEW_ROWS = 1  # of 16 bits, that are multiplied in float32, which spares rounding the tile


class QuantisedWeight(nn.Module):
    """A stack of quantised matrices: codes, and the scales to multiply them by.

    Codes are bytes, matrix after matrix, row after row. With 4 bits a row of n inputs takes the
    next whole number of n / 2 bytes: input j is the low half of byte j, and from the middle of the
    row on inputs are the high halves. Scales are [matrices, outputs, groups], in the dtype of the
    weights; codes are rounded to what the scales, as rounded to that dtype, make of them, so that
    |w - s q| <= s / 2. No scale is below the smallest normal number of the dtype.

    Args:
        weight: the matrices; they stay as they are.
        bits, group: as in `quantise`.
        name: of the weight in an error.

    Example:
        >>> held = QuantisedWeight(torch.tensor([[[7.0, -3.0, 0.4, 0.0]]]), bits=4)
        >>> held.decode(0), held.codes.tolist(), held.scales.tolist()
        (tensor([[ 7., -3.,  0.,  0.]]), [7, 13], [[[1.0]]])
    """

    codes: Int8[Tensor, " bytes"]

    def __init__(
        self,
        weight: Float[Tensor, "matrices outputs inputs"],
        bits: Bits = 8,
        group: int = 32,
        *,
        name: str = "weight",
    ) -> None:
        super().__init__()
        check_sizes(group=group)
        self.matrices, self.outputs, self.inputs = weight.shape
        self.bits = tuple(bits) if isinstance(bits, Sequence) else (bits,) * len(weight)
        self.group = group
        if len(self.bits) != len(weight):
            raise ValueError(f"bits={bits} has {len(self.bits)} entries for {len(weight)} experts")
        for each in self.bits:
            if type(each) is not int or each not in (4, 8):
                raise ValueError(f"bits={each!r} is neither 8 nor 4")
        sizes = [self.outputs * -(-self.inputs * each // 8) for each in self.bits]
        self._ends = [sum(sizes[: e + 1]) for e in range(len(sizes))]
        codes = torch.empty(sum(sizes), dtype=torch.int8, device=weight.device)
        scales = weight.new_empty(*weight.shape[:2], -(-self.inputs // group))
        self.register_buffer("codes", codes)
        self.scales = nn.Parameter(scales, requires_grad=False)
        for e, matrix in enumerate(() if weight.is_meta else weight.detach()):
            if not matrix.isfinite().all():
                raise ValueError(f"{name}[{e}] holds NaN or infinity, which no code stands for")
            coded, self.scales.data[e] = encode(matrix, self.bits[e], group)
            self._codes(e).copy_(coded)

    def _codes(self, e: int) -> Int8[Tensor, "outputs bytes"]:
        start = self._ends[e - 1] if e else 0
        return self.codes[start : self._ends[e]].view(self.outputs, -1)

    def decode(
        self, e: int, first: int = 0, out: Float[Tensor, "rows inputs"] | None = None
    ) -> Float[Tensor, "rows inputs"]:
        """Matrix e, or as many of its rows as `out` has, from `first` on, written there."""
        if out is None:
            dtype = torch.promote_types(self.scales.dtype, torch.float32)
            out = self.scales.new_empty(self.outputs, self.inputs, dtype=dtype)
        rows = slice(first, first + len(out))
        q, scales = self._codes(e)[rows], self.scales.detach()[e, rows].to(out.dtype)
        if self.bits[e] == 8:
            out.copy_(q)
        else:
            half = q.shape[1]
            out[:, :half] = (q << 4).bitwise_right_shift_(4)
            out[:, half:] = (q >> 4)[:, : self.inputs - half]
        whole = self.inputs // self.group
        full = out[:, : whole * self.group].unflatten(1, (whole, self.group))
        full.mul_(scales[:, :whole, None])
        out[:, whole * self.group :].mul_(scales[:, whole:])
        return out

    def tiles(self, e: int, scratch: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Matrix e, as many rows at a time as scratch has, and which rows these are."""
        for first in range(0, self.outputs, len(scratch)):
            rows = slice(first, min(first + len(scratch), self.outputs))
            yield rows, self.decode(e, first, scratch[: rows.stop - first])

    def extra_repr(self) -> str:
        mean = sum(self.bits) / len(self.bits)
        bits = self.bits[0] if len({*self.bits}) == 1 else f"{mean} (mean)"
        sizes = f"matrices={self.matrices}, outputs={self.outputs}, inputs={self.inputs}"
        return f"{sizes}, bits={bits}, group={self.group}"


def encode(
    matrix: Float[Tensor, "outputs inputs"], bits: int, group: int
) -> tuple[Int8[Tensor, "outputs bytes"], Float[Tensor, "outputs groups"]]:
    """Codes and scales of a matrix: see `QuantisedWeight`."""
    w = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    inputs, most = w.shape[1], 2 ** (bits - 1) - 1
    group = min(group, inputs)
    groups = F.pad(w.abs(), (0, -inputs % group)).unflatten(1, (-1, group))
    scales = (groups.amax(dim=-1) / most).to(matrix.dtype)
    scales = scales.clamp(min=torch.finfo(matrix.dtype).tiny)  # also where a group is all zeros
    each = scales.to(w.dtype).repeat_interleave(group, dim=1)[:, :inputs]
    q = (w / each).round().to(torch.int8)  # a scale that was rounded down gives 127.496 at most
    if bits == 8:
        return q, scales
    low, high = F.pad(q, (0, inputs % 2)).chunk(2, dim=1)
    return low & 15 | high << 4, scales


def product(
    rows: Float[Tensor, "rows inputs"],
    sizes: Sequence[int],
    weight: QuantisedWeight,
    bias: Float[Tensor, "matrices outputs"] | None,
) -> Float[Tensor, "rows outputs"]:
    """The next sizes[e] rows times matrix e, transposed, plus bias[e], for every e in order."""
    if torch.compiler.is_compiling():  # to import the compiler takes seconds: not before
        return uncompiled()(rows, sizes, weight, bias)
    return _product(rows, sizes, weight, bias)


@functools.cache
def uncompiled() -> Callable[..., Tensor]:
    """The product as a function that a graph is broken for."""
    return torch.compiler.disable(_product)


def _product(
    rows: Tensor, sizes: Sequence[int], weight: QuantisedWeight, bias: Tensor | None
) -> Tensor:
    y = Product.apply(rows, sizes, weight, False)
    if bias is None:
        return y
    counts = torch.tensor(sizes, device=y.device)
    return y + bias.to(y.dtype).repeat_interleave(counts, dim=0, output_size=len(rows))


class Product(torch.autograd.Function):
    """`product` without its bias; autograd, left to itself, would keep every tile.

    It is linear in the rows, so that its gradient is the same with the matrices transposed.

    Example:
        >>> held = QuantisedWeight(torch.eye(3)[None])
        >>> Product.apply(torch.tensor([[1.0, 2.0, 3.0]]), [1], held, False).round()
        tensor([[1., 2., 3.]])
    """

    @staticmethod
    def forward(rows, sizes, weight, transposed):  # type: ignore[no-untyped-def]
        work = torch.promote_types(rows.dtype, torch.float32)
        tall = min(weight.outputs, max(1, TILE // weight.inputs))
        scratch = rows.new_empty(tall, weight.inputs, dtype=work)
        outputs = weight.inputs if transposed else weight.outputs
        y, start = rows.new_zeros(len(rows), outputs, dtype=work if transposed else None), 0
        for e, size in enumerate(sizes):
            if not size:
                continue
            run, place = rows[start : start + size], y[start : start + size]
            run = run.to(work) if size <= FEW_ROWS else run
            for part, tile in weight.tiles(e, scratch):
                if transposed:  # a sum over tiles
                    place += run[:, part] @ tile.to(run.dtype)
                else:
                    place[:, part] = linear(run, tile, None)
            start += size
        return y.to(rows.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _, *ctx.given = inputs

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        sizes, weight, transposed = ctx.given
        return Product.apply(grad, sizes, weight, not transposed), None, None, None

    @staticmethod
    def jvp(ctx, d_rows, *_):  # type: ignore[no-untyped-def]
        return Product.apply(d_rows, *ctx.given)
