"""Small products on a CPU, where reading the weight costs more than multiplying by it.

The numbers below were measured by `python benchmarks/products.py`: see `benchmarks/README.md`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

BLOCKS = 4  # MKL reads a weight at the speed of memory only as a batch of blocks
LARGE = 2**17  # numbers of a weight from which on that pays; smaller ones may be in a cache
FEW_ROWS, NARROW_ROWS = 3, 8  # up to so many it pays on one thread; more if rows are narrow
NARROW = 512  # inputs
SOME_ROWS = 63  # and on several threads, which share the blocks but not one small product


def linear(
    rows: Float[Tensor, "rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None,
) -> Float[Tensor, "rows outputs"]:
    """F.linear in the dtype of the rows; few float32 rows on a CPU go by blocks of outputs."""
    weight, bias = weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)
    if not pays(rows, weight):
        return F.linear(rows, weight, bias)
    y = in_blocks(rows, weight)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """An `nn.Linear` that multiplies a few rows as `linear` does.

    Example:
        >>> Linear(4, 6)(torch.randn(2, 3, 4)).shape
        torch.Size([2, 3, 6])
    """

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        rows = x.reshape(-1, x.shape[-1])
        if not pays(rows, self.weight):
            return F.linear(x, self.weight, self.bias)
        return linear(rows, self.weight, self.bias).view(*x.shape[:-1], self.out_features)


def pays(rows: Tensor, weight: Tensor) -> bool:
    """Whether a product is faster by blocks."""
    if len(rows) > SOME_ROWS or weight.numel() < LARGE or len(weight) % BLOCKS:
        return False
    if not rows.dtype == weight.dtype == torch.float32 or rows.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return are_few(rows) or torch.get_num_threads() > 1


def are_few(rows: Tensor) -> bool:
    """Whether blocks pay on one thread, for a large weight."""
    return len(rows) <= (NARROW_ROWS if rows.shape[1] <= NARROW else FEW_ROWS)


def in_blocks(
    rows: Float[Tensor, "rows inputs"], weight: Float[Tensor, "outputs inputs"]
) -> Float[Tensor, "rows outputs"]:
    """rows @ weight.T as a batch of products, each with its share of the outputs."""
    rows, blocks = rows.contiguous(), weight.unflatten(0, (BLOCKS, -1))  # MKL is slow with columns
    if are_few(rows):
        return torch.bmm(blocks, rows.T.expand(BLOCKS, -1, -1)).flatten(0, 1).T
    return torch.bmm(rows.expand(BLOCKS, -1, -1), blocks.mT).transpose(0, 1).flatten(1)
