"""How fast the machine at hand is: products, memory, and the parts of this library."""

import os
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..attention import Attention, prepare
from ..experts import Experts
from ..ffn import FeedForward
from ..kernels import cpu
from ..kv_cache import ContiguousCache
from ..layer import MoELayer
from ..routers import TopKRouter

DTYPES = (torch.float32, torch.bfloat16)
CACHES = (64, 32, 16, 8, 4, 2)  # MiB of weights that may stay in a cache
TINY = 16  # features of parts so small that all their time is overhead


@torch.no_grad()
def measure(device: str) -> dict[str, Any]:
    """The fields of a `Machine` that can be measured on one device."""
    cuda = device.startswith("cuda")
    speeds = {size: read_rate(size, device) for size in (256, *CACHES)}
    best, memory = max(speeds.values()), speeds[256]
    cached = [size for size in CACHES if speeds[size] ** 2 > best * memory]
    if cuda:
        name, size = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    else:
        name = f"cpu, {torch.get_num_threads()} threads"
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "name": name,
        "flops": {str(t).removeprefix("torch."): product_rate(t, device) for t in DTYPES},
        "bandwidth": memory,
        "memory": size,
        "cache": max(cached, default=0) * 2**20,
        "cache_bandwidth": best,
        "overhead": overheads(device),
        "source": "measured",
    }


def seconds(run: Callable[[], object], device: str, budget: float = 0.15) -> float:
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


def read_rate(mebibytes: int, device: str) -> float:
    """Bytes/s at which one row after the other is multiplied by weights of so many MiB."""
    d = 512  # a matrix of 1 MiB
    weights = torch.ones(mebibytes, d, d, device=device)
    row = torch.ones(1, d, device=device)

    def read() -> None:
        for weight in weights:
            cpu.linear(row, weight, None)

    single = seconds(lambda: cpu.linear(row[:, :TINY], weights[0, :TINY, :TINY], None), device)
    return weights.nbytes / max(seconds(read, device, 0.1) - mebibytes * single, 1e-9)


def overheads(device: str) -> dict[str, float]:
    """Seconds that each part of this library takes for one token if it is as small as can be."""
    d, vocab = TINY, 64
    config = SimpleNamespace(n_layers=1, kv_heads=2, head_features=d // 2, rope_theta=1e4)
    tokens, x = torch.zeros(1, 1, dtype=torch.long, device=device), torch.randn(1, 1, d)
    x = x.to(device)
    cache = ContiguousCache(config, 1, 64, device=device)
    table, head = torch.randn(vocab, d, device=device), nn.Linear(d, vocab, device=device)
    norm, block = nn.RMSNorm(d).to(device), FeedForward(d, d).to(device)
    attention = Attention(d, 2, 2).to(device)

    def begin() -> Any:
        cache.lengths = torch.full((1,), 32)
        return int(tokens.min()), F.embedding(tokens, table), prepare(config, x, cache=cache)

    step = begin()[-1]
    first, fourth = (
        seconds(lambda layer=layer: layer(x), device)  # type: ignore[misc]
        for layer in (moe_layer(1, device), moe_layer(4, device))
    )
    router = seconds(lambda: moe.router(x[0]), device) if (moe := moe_layer(1, device)) else 0.0
    expert = (fourth - first) / 3
    return {
        "embedding": seconds(begin, device),
        "norm": seconds(lambda: x + norm(x), device),
        "attention": seconds(lambda: attention(x, step), device),
        "dense": seconds(lambda: block(x), device),
        "shared": seconds(lambda: x + block(x), device),
        "router": router,
        "experts": first - router - expert,
        "expert": expert,
        "head": seconds(lambda: head(x), device),
    }


def moe_layer(k: int, device: str) -> MoELayer:
    """The smallest layer whose tokens visit k experts."""
    return MoELayer(TopKRouter(TINY, 8, k), Experts(8, TINY, TINY)).to(device)
