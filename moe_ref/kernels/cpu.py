"""Small products on a CPU, where reading the weight costs more than multiplying by it.

The numbers below were measured by `python benchmarks/products.py`: see `benchmarks/README.md`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FEW_ROWS = 2  # up to so many float32 rows MKL leaves half of the speed of memory on the table
LARGE = 2**18  # numbers of a weight from which on blocks pay, 1 MiB: smaller ones may be cached
BLOCKS = 4  # MKL reads a weight at the speed of memory only as a batch of blocks


def linear(
    rows: Float[Tensor, "rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None,
) -> Float[Tensor, "rows outputs"]:
    """F.linear in the dtype of the rows; one or two float32 rows on a CPU go by blocks."""
    weight, bias = weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)
    few = len(rows) <= FEW_ROWS and weight.numel() >= LARGE and len(weight) % BLOCKS == 0
    known = rows.device.type == "cpu" and rows.dtype == torch.float32
    if not (few and known) or torch.compiler.is_compiling():
        return F.linear(rows, weight, bias)
    y = in_blocks(rows, weight)
    return y if bias is None else y + bias


def in_blocks(
    rows: Float[Tensor, "rows inputs"], weight: Float[Tensor, "outputs inputs"]
) -> Float[Tensor, "rows outputs"]:
    """rows @ weight.T as a batch of products, each with its share of the outputs."""
    blocks = weight.unflatten(0, (BLOCKS, -1))
    return torch.bmm(blocks, rows.T.expand(BLOCKS, -1, -1)).flatten(0, 1).T
