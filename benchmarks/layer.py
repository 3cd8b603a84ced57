"""One MoE layer against transformers' and against the machine, side by side in one process.

    python benchmarks/layer.py [--shape NAME ...] [--tokens N ...] [--dtype D ...] [--backward]
                               [--routing balanced zipf] [--device D]

Peers: the expert implementations of the transformers library ("eager", "grouped_mm", and, for at
most 8 tokens, "batched_mm") on the same weights, behind the same kind of router. All run in turns,
so that a slow moment of the machine falls on all alike; the median counts.

"memory" is the most that the allocations of one call add up to at any moment, weights and input
not counted, and how it compares with that peer's.

The limit of a forward pass is the larger of its FLOPs over the machine's GEMM rate and the bytes
of the weights it touches over its read bandwidth, both measured in the same run.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, product
from statistics import geometric_mean

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moe_ref import Experts, MoELayer, TopKRouter
from moe_ref.course import lesson

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    d_model: int
    d_ff: int
    n_experts: int
    k: int


SHAPES = {
    "olmoe": Shape(2048, 1024, 64, 8),
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
    "quarter-mixtral": Shape(1024, 3584, 8, 2),
}


@dataclass(frozen=True)
class Limits:
    flops: float  # FLOP/s of a large matrix product
    bandwidth: float  # bytes/s of reading memory once, in order

    @classmethod
    def measure(cls, dtype: torch.dtype, device: str) -> "Limits":
        n = 8192 if device.startswith("cuda") else 2048
        a, b = torch.randn(2, n, n, dtype=dtype, device=device)
        flops = 2 * n**3 / lesson.measure(lambda: a @ b, seconds=1)
        buffer = torch.ones(64 * 2**20, device=device)  # 256 MiB, larger than any cache
        return cls(flops, buffer.nbytes / lesson.measure(buffer.sum, seconds=1))


def build(
    shape: Shape, dtype: torch.dtype, device: str
) -> tuple[MoELayer, dict[str, MixtralSparseMoeBlock]]:
    """Our layer, and transformers' blocks that hold the very same tensors."""
    layer = MoELayer(
        TopKRouter(shape.d_model, shape.n_experts, shape.k),
        Experts(shape.n_experts, shape.d_model, shape.d_ff),
    ).to(device, dtype)
    blocks = {}
    for name in ("eager", "grouped_mm", "batched_mm"):
        config = MixtralConfig(
            hidden_size=shape.d_model,
            intermediate_size=8,  # its own weights are thrown away: keep them small
            num_local_experts=shape.n_experts,
            num_experts_per_tok=shape.k,
        )
        config._experts_implementation = name
        block = MixtralSparseMoeBlock(config)
        block.gate.weight = layer.router.weight
        block.experts.gate_up_proj = layer.experts.gate_up
        block.experts.down_proj = layer.experts.down
        blocks[name] = block.to(device, dtype)
    return layer, blocks


def skew(layer: MoELayer, x: Tensor) -> None:
    """Make the popularity of the experts Zipf's: one feature is 1 and its weight is -log(rank)."""
    ranks = torch.arange(1, layer.experts.n_experts + 1, device=x.device)
    with torch.no_grad():
        x[..., 0] = 1
        layer.router.weight[:, 0] = -ranks.log().to(x.dtype)


def runner(call: Callable[[Tensor], Tensor], x: Tensor, backward: bool) -> Callable[[], None]:
    """One forward pass, or a forward and a backward pass, as a function without arguments."""
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                call(x)

        return forward
    leaf = x.clone().requires_grad_()
    return lambda: call(leaf).sum().backward()


def seconds_at_best(shape: Shape, counts: Tensor, dtype: torch.dtype, limits: Limits) -> float:
    """The limit of one forward pass through the experts."""
    weights = 3 * shape.d_model * shape.d_ff
    flops = 2 * weights * int(counts.sum())
    touched = weights * int((counts > 0).sum()) * dtype.itemsize
    return max(flops / limits.flops, touched / limits.bandwidth)


def peak(run: Callable[[], None], device: str) -> int:
    """The most bytes that one call holds at any moment, beyond what there was before."""
    run()  # a first backward pass makes the gradients that all others add to
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = seen.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(accumulate((nbytes for _, nbytes in sorted(changes)), initial=0))


def row(
    name: str,
    tokens: int,
    dtype: torch.dtype,
    routing: str,
    backward: bool,
    limits: Limits,
    device: str,
) -> tuple[str, float]:
    """One line of the table, and the best peer's time over ours."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    layer, blocks = build(shape, dtype, device)
    x = torch.randn(1, tokens, shape.d_model, dtype=dtype, device=device)
    if routing == "zipf":
        skew(layer, x)
    if tokens > 8:
        del blocks["batched_mm"]  # copies the weights of every assignment: gigabytes
    runners = {"moe_ref": runner(lambda x: layer(x)[0], x, backward)}
    runners |= {peer: runner(block, x, backward) for peer, block in blocks.items()}
    memory = {name: peak(run, device) for name, run in runners.items()}
    times = lesson.race(runners, seconds=1)
    ours, held = times.pop("moe_ref"), memory.pop("moe_ref")
    best = min(times, key=times.__getitem__)
    cells = [name, str(tokens), routing, str(dtype).removeprefix("torch."), f"{1000 * ours:.2f}"]
    cells += [f"{times[best] / ours:.2f} ({best})"]
    cells += [f"{held / 2**20:.1f} ({held / memory[best]:.2f})"]
    if not backward:
        with torch.no_grad():
            counts = layer(x)[1].counts
        cells.append(f"{seconds_at_best(shape, counts, dtype, limits) / ours:.2f}")
    return "| " + " | ".join(cells) + " |", times[best] / ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--routing", nargs="+", choices=["balanced", "zipf"], default=["balanced"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backward", action="store_true", help="time forward plus backward")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}")
    device = options.device
    limits = {name: Limits.measure(DTYPES[name], device) for name in options.dtype}
    for name, limit in limits.items():
        print(f"{name}: {limit.flops / 1e9:.0f} GFLOP/s, {limit.bandwidth / 1e9:.1f} GB/s")
    columns = ["shape", "tokens", "routing", "dtype", "ms"]
    columns += ["best peer's time / ours", "MiB (/ that peer's)"]
    columns += [] if options.backward else ["share of the limit"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    ratios = []
    cells = product(options.shape, options.dtype, options.routing, options.tokens)
    for shape, dtype, routing, tokens in cells:
        line, ratio = row(
            shape, tokens, DTYPES[dtype], routing, options.backward, limits[dtype], device
        )
        print(line, flush=True)
        ratios.append(ratio)
    print(f"\ngeometric mean {geometric_mean(ratios):.2f}, worst {min(ratios):.2f}")


if __name__ == "__main__":
    main()
