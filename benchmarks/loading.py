"""Peak memory and time of loading a checkpoint, one file and several, beside the model's own size.

    python benchmarks/loading.py --gigabytes 2

Each load runs in a process of its own. Peak memory is the largest resident set that the system saw,
less what was resident before the load; mapped pages of the file count. It may be at most 1.1 times
the model. The folder is deleted afterwards.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from moe_ref import Transformer, TransformerConfig, checkpoints

LIMIT = 1.1
UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def config_of(gigabytes: float) -> TransformerConfig:
    """A Mixtral with as many layers as fill so much memory in bfloat16."""
    wide = TransformerConfig(32_000, 1024, 1, 16, 3584, n_kv_heads=4, n_experts=8, k=2)
    layer = 8 * 3 * 1024 * 3584 * 2
    layers = max(1, round((gigabytes * 1e9 - 4 * 32_000 * 1024) / layer))
    return TransformerConfig(**{**vars(wide), "n_layers": layers})


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


def write(gigabytes: float, folder: Path) -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Transformer(config_of(gigabytes))
    finally:
        torch.set_default_dtype(default)
    checkpoints.save(model, folder / "one")
    checkpoints.save(model, folder / "several", shard_size=500_000_000)  # four files or so, of 2 GB


def load(folder: Path, small: Path, dtype: torch.dtype | None) -> tuple[int, int, float]:
    """Bytes of the model, bytes of memory that loading took at its peak, and seconds."""
    checkpoints.load(small)  # imports what loading needs
    before, begun = peak(), time.perf_counter()
    model = checkpoints.load(folder, dtype=dtype)
    seconds = time.perf_counter() - begun
    return sum(p.nbytes for p in model.parameters()), peak() - before, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of weights; default: 2")
    options = parser.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints.save(Transformer(TransformerConfig(50, 16, 1, 2, 16)), folder / "small")
        in_a_process(write, options.gigabytes, folder)
        print("| files | dtype | model, GB | peak, GB | ratio | seconds |")
        print("|---|---|---|---|---|---|")
        for kind in ("one", "several"):
            for dtype in (None, torch.float32):
                size, most, seconds = in_a_process(load, folder / kind, folder / "small", dtype)
                ratio = most / size
                worst = max(worst, ratio)
                numbers = f"{size / 1e9:.2f} | {most / 1e9:.2f} | {ratio:.3f} | {seconds:.1f}"
                print(f"| {kind} | {'bfloat16' if dtype is None else 'float32'} | {numbers} |")
    if worst > LIMIT:
        sys.exit(f"peak memory is {worst:.2f} times the model, more than {LIMIT}")


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a new process, whose memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    main()
