"""Small products on a CPU, where reading the weight costs more than multiplying by it.

The numbers below were measured by `python benchmarks/products.py`: see `benchmarks/README.md`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FEW_ROWS = 64  # from this many float32 rows on, one plain product is as fast as blocks
BLOCKS = 4  # MKL reads a weight at the speed of memory only as a batch of blocks
ROWS_FIRST = range(3, 16)  # for this many rows, rows times block is faster than block times rows


def linear(
    rows: Float[Tensor, "rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None,
) -> Float[Tensor, "rows outputs"]:
    """F.linear in the dtype of the rows; few float32 rows on a CPU go by blocks of outputs."""
    weight, bias = weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)
    few = rows.device.type == "cpu" and rows.dtype == torch.float32 and len(rows) < FEW_ROWS
    if not few or len(weight) % BLOCKS or torch.compiler.is_compiling():
        return F.linear(rows, weight, bias)
    y = in_blocks(rows, weight)
    return y if bias is None else y + bias


def in_blocks(
    rows: Float[Tensor, "rows inputs"], weight: Float[Tensor, "outputs inputs"]
) -> Float[Tensor, "rows outputs"]:
    """rows @ weight.T as a batch of products, each with its share of the outputs."""
    blocks = weight.unflatten(0, (BLOCKS, -1))
    if len(rows) in ROWS_FIRST:
        return torch.bmm(rows.expand(BLOCKS, -1, -1), blocks.mT).transpose(0, 1).flatten(1)
    return torch.bmm(blocks, rows.T.expand(BLOCKS, -1, -1)).flatten(0, 1).T
