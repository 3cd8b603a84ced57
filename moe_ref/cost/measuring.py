"""How fast the machine at hand is: products, memory, and the parts of this library."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..attention import Attention, prepare
from ..config import TransformerConfig
from ..experts import Experts
from ..ffn import FeedForward
from ..kernels import cpu
from ..kv_cache import ContiguousCache
from ..layer import MoELayer
from ..routers import TopKRouter

DTYPES = (torch.float32, torch.bfloat16)
CACHES = (4, 8, 16, 32, 64)  # MiB of weights that may stay in a cache
BEYOND = 192  # MiB that no cache holds
SEVERAL = 4  # rows from which on reading weights takes no longer; one row alone is faster
BUSY = 8  # experts of the layers that are timed
WIDE, MANY = 256, 256  # features and tokens of parts in which every operator has work to do


@torch.no_grad()
def measure(device: str) -> dict[str, Any]:
    """The fields of a `Machine` that can be measured on one device."""
    if device.startswith("cuda"):
        name, size = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    else:
        name = f"cpu, {torch.get_num_threads()} threads"
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    flops = {str(t).removeprefix("torch."): product_rate(t, device) for t in DTYPES}
    peak = flops["float32"]
    speeds = {n: read_rate(n, SEVERAL, peak, device) for n in (*CACHES, BEYOND)}
    middle = (max(speeds.values()) * speeds[BEYOND]) ** 0.5
    cached = [n for n in CACHES if speeds[n] > middle]
    overhead, _ = part_times(16, 1, device)
    return {
        "name": name,
        "flops": flops,
        "bandwidth": speeds[BEYOND],
        "row_bandwidth": read_rate(BEYOND, 1, peak, device),
        "memory": size,
        "cache": max(cached, default=0) * 2**20,
        "cache_bandwidth": statistics.median(speeds[n] for n in cached) if cached else 0.0,
        "overhead": overhead,
        "elementwise": elementwise(overhead, peak, device),
        "source": "measured",
    }


def seconds(run: Callable[[], object], device: str, budget: float = 0.1) -> float:
    """Median time of a call, of at least 5."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    run()
    wait()
    taken, end = [], time.perf_counter() + budget
    while len(taken) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def product_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a large product."""
    n = 8192 if device.startswith("cuda") else 1024
    a, b = torch.randn(2, n, n, dtype=dtype, device=device)
    return 2 * n**3 / seconds(lambda: a @ b, device, 0.3)


def read_rate(mebibytes: int, rows: int, peak: float, device: str) -> float:
    """Bytes/s of weights in products of few rows, multiplying itself left out."""
    d = 1024  # a matrix of 4 MiB
    weights, x = torch.ones(mebibytes // 4, d, d, device=device), torch.ones(rows, d, device=device)

    def read() -> None:
        for weight in weights:
            cpu.linear(x, weight, None)

    each = seconds(read, device) / len(weights) - 2 * rows * d * d / peak
    return weights[0].nbytes / max(each, 1e-6)


def elementwise(overhead: Mapping[str, float], peak: float, device: str) -> dict[str, float]:
    """Seconds for each number of a part, beside its products and what any part takes."""
    taken, products = part_times(WIDE, MANY, device)
    beside = {name: taken[name] - overhead[name] - products[name] / peak for name in taken}
    beside["experts"] -= BUSY * overhead["expert"]
    beside["expert"] += overhead["expert"]  # the difference of two layers had as many experts
    numbers = {name: MANY * WIDE + products[name] / (2 * WIDE) for name in taken}
    return {name: max(beside[name], 0.0) / numbers[name] for name in taken}


def part_times(d: int, tokens: int, device: str) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds of each part of this library at these sizes, and the FLOPs of its products."""
    config = TransformerConfig(64, d, 1, 2, 2 * d)
    ids = torch.zeros(tokens, 1, dtype=torch.long, device=device)
    x, table = torch.randn(tokens, 1, d, device=device), torch.randn(64, d, device=device)
    cache = ContiguousCache(config, tokens, 64, device=device)
    norm, head = nn.RMSNorm(d).to(device), nn.Linear(d, 64, device=device)
    attention, block = Attention(d, 2, 2).to(device), FeedForward(d, 2 * d).to(device)
    experts = Experts(BUSY, d, 2 * d)
    layers = [MoELayer(TopKRouter(d, BUSY, k), experts).to(device) for k in (1, 4)]

    def begin() -> Any:
        cache.lengths = torch.full((tokens,), 32)
        return int(ids.min()), F.embedding(ids, table), prepare(config, x, cache=cache)

    def clock(run: Callable[[], object]) -> float:
        return seconds(run, device)

    step = begin()[-1]
    one, four = (clock(partial(layer, x)) for layer in layers)
    router, expert = clock(lambda: layers[0].router(x[:, 0])), (four - one) / 3
    taken = {
        "embedding": clock(begin),
        "norm": clock(lambda: x + norm(x)),
        "attention": clock(lambda: attention(x, step)),
        "dense": clock(lambda: block(x)),
        "shared": clock(lambda: x + block(x)),
        "router": router,
        "experts": one - router - expert,
        "expert": expert,
        "head": clock(lambda: head(x)),
    }
    products = dict.fromkeys(taken, 0)
    products |= {"attention": 8 * d * d * tokens, "router": 2 * BUSY * d * tokens}
    products |= dict.fromkeys(("dense", "shared", "expert"), 12 * d * d * tokens)
    return taken, products | {"head": 128 * d * tokens}
