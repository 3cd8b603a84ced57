"""Small trainings, three seeds each, whose held-out losses notebooks 07 and 08 compare.

    python scripts/experiments.py [experiment ...] [--jobs 2] [--steps 400] [--seeds 3]

Writes data/measurements/experiments.csv, a line for each evaluation of each run; runs that are in
it already are not repeated, so that an interrupted command can be given again.

    experts     equal active FLOPs: a dense model, and MoEs of 4, 16 and 64 experts, top-2
    data        a dense model and 16 experts, trained on an eighth of the documents
    upcycling   a dense model trained on, the same model upcycled and trained on, a MoE from scratch
    fine        equal active FLOPs: 8 experts top-2; 32 of a quarter of the size, top-8; 31, top-7,
                and a shared one that every token visits
"""

import argparse
import hashlib
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from tiny import MIX

from moe_ref import Transformer, TransformerConfig, training
from moe_ref.course import corpora
from moe_ref.model import upcycle

FILE = Path(__file__).parents[1] / "data" / "measurements" / "experiments.csv"
DENSE = TransformerConfig(4096, 128, 3, 4, 256, n_kv_heads=2, tied=True)
TRAINING = training.TrainingConfig(
    steps=400,
    warmup=40,
    balance={"switch": 0.01, "z": 0.001},
    evaluate_every=50,
)
BATCH, SEQ = 16, 128
WINDOWS = 8  # of each domain, that an evaluation reads


def moe(n_experts: int, k: int = 2, d_ff: int = 128, d_shared: int = 0) -> TransformerConfig:
    return replace(DENSE, n_experts=n_experts, k=k, d_ff=d_ff, d_shared=d_shared)


@dataclass(frozen=True)
class Run:
    experiment: str
    name: str
    config: TransformerConfig
    seed: int
    share: float = 1.0  # of the documents to train on
    stretch: float = 1.0  # of the steps
    start: str = ""  # "dense": go on from a dense model; "upcycled": upcycle it first


def plan(seeds: int) -> list[Run]:
    """All runs, the longest first."""
    sixteen = moe(16)
    wide = moe(16, d_ff=256)  # what upcycling the dense model gives: twice its active FLOPs
    return [
        run
        for seed in range(seeds)
        for run in (
            Run("upcycling", "scratch", wide, seed, stretch=1.5),
            Run("upcycling", "upcycled", wide, seed, stretch=1.5, start="upcycled"),
            Run("upcycling", "dense", DENSE, seed, stretch=1.5, start="dense"),
            Run("experts", "64", moe(64), seed),
            Run("experts", "16", sixteen, seed),
            Run("experts", "4", moe(4), seed),
            Run("experts", "dense", DENSE, seed),
            Run("fine", "fine", moe(32, k=8, d_ff=32), seed),
            Run("fine", "fine + shared", moe(31, k=7, d_ff=32, d_shared=32), seed),
            Run("fine", "coarse", moe(8), seed),
            Run("data", "moe 1/8", sixteen, seed, share=0.125),
            Run("data", "dense 1/8", DENSE, seed, share=0.125),
        )
    ]


def carry_out(run: Run, steps: int) -> list[dict]:
    """Train one model and return its lines of the file."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    config = replace(TRAINING, steps=round(run.stretch * steps))
    model = Transformer(DENSE if run.start else run.config)
    switch = config.steps // 2 if run.start == "upcycled" else -1
    optimizer = training.make_optimizer(model, config)
    data = corpora.batches(some_documents(run.share), batch=BATCH, seq=SEQ, seed=run.seed, mix=MIX)
    lines, seconds = [], 0.0
    for step in range(config.steps):
        if step == switch:
            model = upcycle(model, run.config.n_experts, k=run.config.k)
            optimizer = training.make_optimizer(model, config)
        seconds += training.update(model, optimizer, [next(data)], config, step)["seconds"]
        if (step + 1) % config.evaluate_every == 0:
            lines.append(line(run, step + 1, seconds, model))
    return lines


def line(run: Run, step: int, seconds: float, model: Transformer) -> dict:
    losses = corpora.held_out_losses(model, corpora.DOMAINS, seq=SEQ, limit=WINDOWS)
    return {
        "experiment": run.experiment,
        "run": run.name,
        "seed": run.seed,
        "step": step,
        "tokens": step * BATCH * SEQ,
        "seconds": round(seconds, 1),
        "loss": round(sum(losses.values()) / len(losses), 4),
        **{domain: round(loss, 4) for domain, loss in losses.items()},
    }


def some_documents(share: float) -> dict[str, tuple[str, ...]]:
    """A share of the documents of each domain, chosen by their own hash."""

    def chosen(text: str) -> bool:
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        return int.from_bytes(digest[8:16], "big") < share * 2**64

    return {name: tuple(filter(chosen, corpora.documents(name))) for name in corpora.DOMAINS}


def missing(runs: list[Run]) -> Iterator[Run]:
    """The runs that the file has no lines of."""
    done = set()
    if FILE.exists():
        table = pd.read_csv(FILE, dtype={"run": str})
        done = set(zip(table["experiment"], table["run"], table["seed"], strict=True))
    return (run for run in runs if (run.experiment, run.name, run.seed) not in done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="*", help="experts, data, upcycling, fine; none: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--steps", type=int, default=TRAINING.steps)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    wanted = options.experiments or ["experts", "data", "upcycling", "fine"]
    runs = [run for run in missing(plan(options.seeds)) if run.experiment in wanted]
    FILE.parent.mkdir(exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        waiting = [(run, pool.apply_async(carry_out, (run, options.steps))) for run in runs]
        for run, result in waiting:
            pd.DataFrame(result.get()).to_csv(FILE, mode="a", header=not FILE.exists(), index=False)
            print(run.experiment, run.name, "seed", run.seed, flush=True)
    table = pd.read_csv(FILE, dtype={"run": str})
    order = ["experiment", "run", "seed", "step"]
    table.sort_values(order).to_csv(FILE, index=False)
    last = table.sort_values("step").groupby(["experiment", "run", "seed"]).tail(1)
    print(last.groupby(["experiment", "run"])["loss"].agg(["mean", "std", "count"]).round(3))


if __name__ == "__main__":
    main()
