"""Times that `moe_ref.cost` predicts beside those measured: a layer, prefill and decode.

    python benchmarks/cost.py [--size NAME ...] [--batch N ...] [--prompt N] [--device D]

Before each size the machine is measured, by `Machine.measured()`, and all is done three times,
since the speed of a machine that is shared drifts; nothing is fitted to the models. A ratio is
measured over predicted. The first prediction takes tokens for independent and all experts for
equally popular; the second is told how many experts of a layer the pass visited. "binds" names the
term that the prediction says is the largest.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from moe_ref import Transformer, TransformerConfig, cost
from moe_ref.course import lesson
from moe_ref.kv_cache import ContiguousCache
from moe_ref.layer import MoELayer

SIZES = {
    "tiny": TransformerConfig(2048, 96, 4, 4, 192, n_kv_heads=2, n_experts=24, k=2, tied=True),
    "small": TransformerConfig(2048, 256, 4, 4, 512, n_kv_heads=2, n_experts=8, k=2),
    "many": TransformerConfig(2048, 512, 4, 8, 256, n_kv_heads=4, n_experts=64, k=8),
    "wide": TransformerConfig(4096, 1024, 2, 16, 512, n_kv_heads=4, n_experts=32, k=4),
    "large": TransformerConfig(4096, 1024, 4, 16, 2048, n_kv_heads=4, n_experts=8, k=2),
    # Chosen after the form of the prediction was settled: with a shared expert, and heads of 64.
    "unseen": TransformerConfig(
        3000, 640, 3, 10, 384, n_kv_heads=2, n_experts=48, k=6, d_shared=384
    ),
}
CONTEXT = 64  # tokens read before a decode step


class Case(NamedTuple):
    """Seconds, measured and predicted: of independent tokens, and with the visits known."""

    measured: float
    independent: float
    known: float
    binds: str


def middle(several: list[Case], of: Callable[[Case], float]) -> float:
    return statistics.median(map(of, several))


def decode(model: Transformer, batch: int) -> Callable[[], object]:
    """A step of `batch` sequences, always at the same place."""
    device = model.embedding.weight.device
    cache = ContiguousCache(model.config, batch, CONTEXT + 1, device=device)
    tokens = torch.randint(model.config.vocab_size, (batch, 1), device=device)

    def step() -> object:
        cache.lengths = torch.full((batch,), CONTEXT)
        return model(tokens, cache=cache)

    return step


def runs(
    model: Transformer, batch: int, prompt: int
) -> dict[str, tuple[Callable[[], object], dict[str, int]]]:
    """What is measured, and the arguments of `cost.time` that describe it."""
    config, device = model.config, model.embedding.weight.device
    layer = next(part for part in model.modules() if isinstance(part, MoELayer))
    x = torch.randn(batch, config.d_model, device=device)
    tokens = torch.randint(config.vocab_size, (batch, prompt), device=device)
    return {
        "layer": (lambda: layer(x), {"batch": batch}),
        "prefill": (lambda: model(tokens), {"batch": batch, "tokens": prompt}),
        "decode": (decode(model, batch), {"batch": batch, "context": CONTEXT}),
    }


def visited(output: object) -> float:
    """Experts that a layer's tokens visited, in the mean of all layers."""
    routings = getattr(output, "routings", None) or [output[1]]
    return sum(int((r.counts > 0).sum()) for r in routings) / len(routings)


def layer_parts(config: TransformerConfig) -> list[cost.Part]:
    """The parts of one MoE layer."""
    inside = [part for part in cost.parts(config) if part.name in ("router", "experts")]
    return [replace(part, places=1) for part in inside]


def cases(size: str, options: argparse.Namespace) -> Iterator[tuple[tuple[str, int, str], Case]]:
    """Each case of a size, measured and predicted once."""
    machine = cost.Machine.measured(options.device)
    torch.manual_seed(0)
    model = Transformer(SIZES[size]).to(options.device).eval()
    for batch in options.batch:
        for name, (run, about) in runs(model, batch, options.prompt).items():
            of = layer_parts(model.config) if name == "layer" else model.config
            predicted = [
                cost.time(of, machine, dtype="float32", visited=known, **about)
                for known in (None, visited(run()))
            ]
            measured = lesson.measure(run, seconds=0.3)
            totals = (predicted[0].total, predicted[1].total)
            yield (size, batch, name), Case(measured, *totals, predicted[0].binds)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a sequence in prefill")
    parser.add_argument("--rounds", type=int, default=3, help="of which each figure is the median")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    found: defaultdict[tuple[str, int, str], list[Case]] = defaultdict(list)
    for _ in range(options.rounds):
        for size in options.size:
            for key, case in cases(size, options):
                found[key].append(case)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(
        "| size | batch | of | measured, ms | predicted, ms | ratio | visits known | ratio |",
        end="",
    )
    print(" binds |\n|---|--:|---|--:|--:|--:|--:|--:|---|")
    off: dict[str, list[float]] = {"independent tokens": [], "visits known": []}
    for (size, batch, name), several in found.items():
        cells = [size, str(batch), name, f"{1000 * middle(several, lambda c: c.measured):.2f}"]
        for title, which in zip(off, ("independent", "known"), strict=True):
            ratio = middle(several, lambda c, which=which: c.measured / getattr(c, which))
            predicted = middle(several, lambda c, which=which: getattr(c, which))
            cells += [f"{1000 * predicted:.2f}", f"{ratio:.2f}"]
            off[title].append(max(ratio, 1 / ratio))
        print("| " + " | ".join([*cells, several[0].binds]) + " |")
    print()
    for title, ratios in off.items():
        within = sum(ratio <= 1.5 for ratio in ratios)
        print(f"{title}: worst ratio {max(ratios):.2f}; {within} of {len(ratios)} within 1.5")


if __name__ == "__main__":
    main()
