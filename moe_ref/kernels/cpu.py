"""Small products on a CPU, where reading the weight costs more than multiplying by it.

The numbers below were measured by `python benchmarks/products.py`: see `benchmarks/README.md`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

BLOCKS = 4  # MKL reads a weight at the speed of memory only as a batch of blocks
LARGE = 2**16  # numbers of a weight from which on that pays
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
    if not pays(rows, weight) or torch.compiler.is_compiling():
        return F.linear(rows, weight, bias)
    y = in_blocks(rows, weight)
    return y if bias is None else y + bias


def pays(rows: Tensor, weight: Tensor) -> bool:
    """Whether a product is faster by blocks."""
    if rows.dtype != torch.float32 or rows.device.type != "cpu" or len(rows) > SOME_ROWS:
        return False
    large = weight.numel() >= LARGE and len(weight) % BLOCKS == 0
    return large and (are_few(rows) or torch.get_num_threads() > 1)


def are_few(rows: Tensor) -> bool:
    """Whether blocks pay on one thread, for a large weight."""
    return len(rows) <= (NARROW_ROWS if rows.shape[1] <= NARROW else FEW_ROWS)


def in_blocks(
    rows: Float[Tensor, "rows inputs"], weight: Float[Tensor, "outputs inputs"]
) -> Float[Tensor, "rows outputs"]:
    """rows @ weight.T as a batch of products, each with its share of the outputs."""
    rows, blocks = rows.contiguous(), weight.unflatten(0, (BLOCKS, -1))  # columns take four times
    if are_few(rows):
        return torch.bmm(blocks, rows.T.expand(BLOCKS, -1, -1)).flatten(0, 1).T
    return torch.bmm(rows.expand(BLOCKS, -1, -1), blocks.mT).transpose(0, 1).flatten(1)
