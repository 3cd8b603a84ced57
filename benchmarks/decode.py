"""Prefill and decode of whole models beside transformers' and beside the machine's limit.

    python benchmarks/decode.py [--model NAME ...] [--dtype D ...] [--batch N ...] [--prefill N ...]
                                [--peer NAME ...] [--rounds N] [--device D]

The peers are transformers' Mixtral with the same weights, once for each of its expert
implementations. All take turns in one process; the median of the rounds counts. Prefill is one
forward pass over a prompt, decode a call of each library's own `generate`, greedy, less the time of
its prefill. The limit is the larger of reading what the pass touches, and of its FLOPs, at the
speeds that `benchmarks/layer.py` measures: of memory, and of a large product.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from layer import DTYPES, Limits
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from moe_ref import Transformer, TransformerConfig, checkpoints, cost, generation

TINY = Path(__file__).parents[1] / "data" / "tiny-moe"
SIZES = {  # random weights: 99 and 516 million
    "100m": TransformerConfig(8192, 512, 8, 8, 448, n_kv_heads=4, n_experts=16, k=2, tied=True),
    "500m": TransformerConfig(16384, 1024, 8, 16, 1216, n_kv_heads=4, n_experts=16, k=2, tied=True),
}
PROMPT = 16  # tokens before those that decode makes
NEW = 9  # of which the prefill makes the first


def build(name: str, dtype: torch.dtype, device: str) -> Transformer:
    if name == "tiny-moe":
        return checkpoints.load(TINY, dtype=dtype, device=device).eval()
    torch.manual_seed(0)
    return Transformer(SIZES[name]).to(device, dtype).eval()


def peers_of(model: Transformer, names: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Transformers' model with the same numbers, once for each expert implementation."""
    weight = model.embedding.weight
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(model, folder)
        for name in names:
            peer = AutoModelForCausalLM.from_pretrained(
                folder, dtype=weight.dtype, experts_implementation=name
            )
            yield name, peer.to(weight.device).eval()


def ours(model: Transformer, tokens: Tensor, new: int) -> Callable[[], object]:
    if new == 0:
        return lambda: model(tokens)
    return lambda: generation.generate(model, tokens, new)


def theirs(model: nn.Module, tokens: Tensor, new: int) -> Callable[[], object]:
    if new == 0:
        return lambda: model(tokens, use_cache=False)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    seen = torch.ones_like(tokens)
    return lambda: model.generate(tokens, attention_mask=seen, pad_token_id=0, **options)


def race(runners: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each runner in each round."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds + 1):  # the first warms up
        for name, run in runners.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return taken


def at_best(model: Transformer, tokens: Tensor, context: int, limits: Limits) -> float:
    """Seconds of a pass over these tokens, were it as fast as the machine."""
    config, dtype = model.config, model.embedding.weight.dtype
    batch, seq = tokens.shape
    visited = [int((r.counts > 0).sum()) for r in model(tokens).routings]
    fastest = cost.Machine(
        "limit",
        flops={str(dtype).removeprefix("torch."): limits.flops},
        bandwidth=limits.bandwidth,
        memory=1e12,
    )
    return cost.time(
        config,
        fastest,
        batch=batch,
        tokens=seq,
        context=context,
        dtype=str(dtype).removeprefix("torch."),
        visited=statistics.mean(visited),
    ).limit


def cell(
    model: Transformer,
    peers: dict[str, nn.Module],
    batch: int,
    prompt: int,
    limits: Limits,
    rounds: int,
) -> tuple[list[str], float]:
    """Ours and the best peer's speed in one row; `prompt` is 0 for decode."""
    device, vocab = model.embedding.weight.device, model.config.vocab_size
    tokens = torch.randint(2, vocab, (batch, prompt or PROMPT), device=device)
    tasks = {"moe_ref": ours} | dict.fromkeys(peers, theirs)
    models = {"moe_ref": model} | peers
    lengths = (0,) if prompt else (1, NEW)
    runners = {
        f"{name} {new}": task(models[name], tokens, new)
        for new in lengths
        for name, task in tasks.items()
    }
    taken = race(runners, rounds)
    seconds = {}
    for name in tasks:
        whole = taken[f"{name} {lengths[-1]}"]
        first = [0.0] * rounds if prompt else taken[f"{name} 1"]
        seconds[name] = statistics.median(a - b for a, b in zip(whole, first, strict=True))
    mine, best = seconds.pop("moe_ref"), min(seconds, key=seconds.__getitem__)
    made = batch * (prompt or NEW - 1)
    if prompt:
        limit = at_best(model, tokens, 0, limits)
    else:
        limit = (NEW - 1) * at_best(model, tokens[:, -1:], PROMPT + NEW // 2, limits)
    ratio = seconds[best] / mine
    return [f"{made / mine:,.0f}", f"{ratio:.2f} ({best})", f"{limit / mine:.2f}"], ratio


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["tiny-moe", *SIZES])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 4, 16, 64], help="of decode")
    parser.add_argument("--prefill", nargs="*", type=int, default=[128, 1024], help="tokens")
    parser.add_argument("--peer", nargs="+", default=["eager", "grouped_mm", "batched_mm"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging.disable_progress_bar()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}")
    limits = {name: Limits.measure(DTYPES[name], options.device) for name in options.dtype}
    for name, limit in limits.items():
        print(f"{name}: {limit.flops / 1e9:.0f} GFLOP/s, {limit.bandwidth / 1e9:.1f} GB/s")
    print("| model | dtype | of | batch | tokens per second | best peer's time / ours | limit |")
    print("|---|---|---|--:|--:|---|--:|")
    ratios = []
    for name, dtype in product(options.model, options.dtype):
        model = build(name, DTYPES[dtype], options.device)
        peers = dict(peers_of(model, options.peer))
        cells = [(1, prompt) for prompt in options.prefill]
        for batch, prompt in [*cells, *((batch, 0) for batch in options.batch)]:
            # batched_mm copies the weights of every assignment: gigabytes in a large pass.
            small = {n: p for n, p in peers.items() if n != "batched_mm" or batch + prompt <= 4}
            row, ratio = cell(model, small, batch, prompt, limits[dtype], options.rounds)
            of = f"prefill {prompt}" if prompt else "decode"
            print("| " + " | ".join([name, dtype, of, str(batch), *row]) + " |", flush=True)
            ratios.append(ratio)
    print(f"\ngeometric mean {statistics.geometric_mean(ratios):.2f}, worst {min(ratios):.2f}")


if __name__ == "__main__":
    main()
