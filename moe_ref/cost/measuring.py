"""How fast the machine at hand is: products, memory, and the parts of this library."""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import Attention, attend, prepare
from ..config import TransformerConfig
from ..dispatch import sorted_rows
from ..experts import Experts
from ..ffn import FeedForward, activate
from ..kernels import cpu
from ..kv_cache import ContiguousCache
from ..layer import MoELayer
from ..rotary import rotate
from ..routers import TopKRouter

DTYPES = (torch.float32, torch.bfloat16)
CACHES = (4, 8, 16, 32, 64)  # MiB of weights that may stay in a cache
BEYOND = 192  # MiB that no cache holds
SEVERAL = 4  # rows from which on reading weights takes no longer; one row alone is faster


@torch.no_grad()
def measure(device: str) -> dict[str, Any]:
    """The fields of a `Machine` that can be measured on one device."""
    if device.startswith("cuda"):
        name, size = torch.cuda.get_device_name(), float(torch.cuda.mem_get_info()[1])
    else:
        name, size = f"cpu, {torch.get_num_threads()} threads", math.inf
        if hasattr(os, "sysconf"):  # Windows has none
            size = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    flops = {str(t).removeprefix("torch."): product_rate(t, device) for t in DTYPES}
    peak = flops["float32"]
    speeds = {n: read_rate(n, SEVERAL, peak, device) for n in (*CACHES, BEYOND)}
    best = max(speeds.values())
    cached = [n for n in CACHES if speeds[n] > 0.8 * best] if best > 1.25 * speeds[BEYOND] else []
    return {
        "name": name,
        "flops": flops,
        "bandwidth": speeds[BEYOND],
        "row_bandwidth": read_rate(BEYOND, 1, peak, device),
        "memory": size,
        "cache": max(cached, default=0) * 2**20,
        "cache_bandwidth": statistics.median(speeds[n] for n in cached) if cached else 0.0,
        "overhead": overheads(device),
        "elementwise": elementwise(device),
        "source": "measured",
    }


def seconds(run: Callable[[], object], device: str, budget: float = 0.1) -> float:
    """Time of a call: the median of 8 or more."""
    return by_turns({"": run}, device, budget)[""]


def by_turns(
    runs: Mapping[str, Callable[[], object]], device: str, budget: float
) -> dict[str, float]:
    """Median time of each call; they take turns, so that what slows the machine slows all."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + budget
    while len(next(iter(taken.values()))) < 8 or time.perf_counter() < end:
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in taken.items()}


def product_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a large product."""
    n = 8192 if device.startswith("cuda") else 2048
    a, b = torch.randn(2, n, n, dtype=dtype, device=device)
    return 2 * n**3 / seconds(lambda: a @ b, device, 0.3)


def read_rate(mebibytes: int, rows: int, peak: float, device: str) -> float:
    """Bytes/s of weights in products of few rows, multiplying itself left out."""
    # Matrices of 2 MiB, as small experts have; on a GPU one, whose launch is nothing beside it.
    count, d = 1 if device.startswith("cuda") else mebibytes // 2, 1024
    weights = torch.ones(count, mebibytes * 256 // count, d, device=device)
    x = torch.ones(rows, d, device=device)

    def read() -> None:
        for weight in weights:
            cpu.linear(x, weight, None)

    each = seconds(read, device) / count - 2 * rows * weights[0].numel() / peak
    return weights[0].nbytes / max(each, 1e-6)


def overheads(device: str) -> dict[str, float]:
    """Seconds of each part of this library for one token, so small that its work is nothing."""
    d = 16
    config = TransformerConfig(64, d, 1, 2, d)
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    x, table = torch.randn(1, 1, d, device=device), torch.randn(64, d, device=device)
    cache: Any = ContiguousCache(config, 1, 64, device=device)
    norm, head = nn.RMSNorm(d).to(device), nn.Linear(d, 64, device=device)
    attention, block = Attention(d, 2, 2).to(device), FeedForward(d, d).to(device)
    experts = Experts(8, d, d)
    layers = [MoELayer(TopKRouter(d, 8, k), experts).to(device) for k in (1, 8)]

    def begin() -> Any:
        cache.lengths = torch.full((1,), 32)
        return int(ids.min()), F.embedding(ids, table), prepare(config, x, cache=cache)

    step = begin()[-1]

    def together() -> Any:
        y = x + attention(norm(x), begin()[-1])
        return head(norm(y + layers[0](norm(y))[0]) + block(y))

    runs: dict[str, Callable[[], object]] = {
        "embedding": begin,
        "norm": lambda: x + norm(x),
        "attention": lambda: attention(x, step),
        "dense": lambda: block(x),
        "shared": lambda: x + block(x),
        "router": lambda: layers[0].router(x[:, 0]),
        "mix": lambda: x * head(x).softmax(-1)[..., :1],
        "head": lambda: head(x),
    }
    runs |= {"one": partial(layers[0], x), "all": partial(layers[1], x), "together": together}
    alone = by_turns(runs, device, 1.0)
    one, every, whole = (alone.pop(name) for name in ("one", "all", "together"))
    alone["expert"] = max(every - one, 0.0) / 7  # a token that visits one expert, and all eight
    alone["experts"] = max(one - alone["router"] - alone["expert"], 0.0)
    # A part takes longer after others than again and again: its code has left the caches. That
    # is not so for experts, which come one after the other.
    several = sum(alone.values()) - alone["shared"] - alone["mix"] + 2 * alone["norm"]
    cold = max(whole / several, 1.0)
    return {name: taken * (1 if name == "expert" else cold) for name, taken in alone.items()}


def elementwise(device: str) -> dict[str, float]:
    """Seconds for each of `Part.numbers` and each token of what a part does beside products."""
    batch, seq, d, heads, k = 16, 64, 256, 4, 2
    tokens, x = batch * seq, torch.randn(batch * seq, d, device=device)
    norm, router = nn.RMSNorm(d).to(device), TopKRouter(d, 8, k).to(device)
    routing, hidden = router(x), torch.randn(tokens, 4 * d, device=device)
    q = torch.randn(batch, heads, seq, d // heads, device=device)
    cos = sin = torch.ones(1, 1, seq, d // heads, device=device)

    def mix() -> Tensor:
        return attend(rotate(q, cos, sin), rotate(q, cos, sin), q).transpose(1, 2).flatten(2)

    def clock(run: Callable[[], object]) -> float:
        return seconds(run, device) / (tokens * d)

    def copy(rows: Tensor, counts: Tensor) -> Tensor:
        return torch.empty_like(rows).copy_(rows)  # as each expert's rows come to their place

    activated = clock(lambda: activate(hidden, "swiglu")) / 7  # a block of 2 * d has 7 * d numbers
    moved = clock(lambda: sorted_rows(x, routing, copy)) / k / 7
    return {
        "norm": clock(lambda: x + norm(x)),
        "attention": clock(mix) / 5,
        "router": clock(lambda: router(x)),
        "dense": activated,
        "shared": activated,
        "expert": activated + moved,
    }
