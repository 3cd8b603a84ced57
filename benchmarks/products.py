"""How fast few rows are multiplied by a weight on a CPU, by the ways of `moe_ref.kernels.cpu`.

    python benchmarks/products.py [--rows N ...] [--dtype D ...]

For each number of rows the speed at which the weights are read, GB/s, by F.linear and by the other
ways. As in a layer, many experts take turns, so that no weight is in a cache when its turn comes.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ref.course import lesson
from moe_ref.kernels.cpu import in_blocks


def without_onednn(rows: Tensor, weight: Tensor) -> Tensor:
    """torch's own kernel. Its only switch is for the whole process, so a layer can't use it."""
    with torch.backends.mkldnn.flags(enabled=False):
        return F.linear(rows, weight)


# Outputs and inputs of the two projections of OLMoE's experts, then of a quarter of Mixtral's.
SHAPES = [(2048, 2048), (2048, 1024), (7168, 1024), (1024, 3584)]
WAYS: dict[str, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "float32": {"F.linear": F.linear, "in blocks": in_blocks},
    "bfloat16": {"F.linear": F.linear, "without oneDNN": without_onednn},
}


def each(way: Callable[[Tensor, Tensor], Tensor], rows: Tensor, weights: Tensor) -> None:
    for run, weight in zip(rows, weights, strict=True):
        way(run, weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--dtype", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    buffer = torch.ones(64 * 2**20)
    speed = buffer.nbytes / lesson.measure(buffer.sum) / 1e9
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, memory {speed:.1f} GB/s")
    print("| dtype | outputs, inputs | way | " + " | ".join(map(str, options.rows)) + " |")
    print("|---|---|---|" + "--:|" * len(options.rows))
    for dtype in options.dtype:
        for outputs, inputs in SHAPES:
            weights = torch.randn(8 if outputs * inputs > 2**22 else 16, outputs, inputs)
            weights = weights.to(getattr(torch, dtype))
            cells: dict[str, list[str]] = {way: [] for way in WAYS[dtype]}
            for n in options.rows:
                rows = torch.randn(len(weights), n, inputs, dtype=weights.dtype)
                runners = {
                    name: partial(each, way, rows, weights) for name, way in WAYS[dtype].items()
                }
                for name, seconds in lesson.race(runners, seconds=0.3).items():
                    cells[name].append(f"{weights.nbytes / seconds / 1e9:.1f}")
            for name, speeds in cells.items():
                print(f"| {dtype} | {outputs}, {inputs} | {name} | " + " | ".join(speeds) + " |")


if __name__ == "__main__":
    main()
