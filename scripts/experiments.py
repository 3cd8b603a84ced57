"""Small trainings, three seeds each, whose held-out losses notebooks 07, 08 and 10 compare.

    python scripts/experiments.py [experiment ...] [--jobs 2] [--steps 400] [--seeds 3]

Writes data/measurements/experiments.csv, a line for each run: the loss at its end over all held-out
text of the three domains that it reads. Runs that are in it already are not repeated, so that an
interrupted command can be given again.

    rates       the dense model and the MoE of `tiny.py`, at four learning rates each; the best one
                from every seed
    experts     equal active FLOPs: MoEs of 8 and 64 experts, top-2; and 24 without the scale
    fine        equal active FLOPs: 8 experts top-2 (in "experts"); 32 of a quarter of the size,
                top-8; 31, top-7, and a shared one that every token visits
    pyramid     equal active FLOPs and as many experts: 8, 16, 32 and 40 from the first layer to the
                last; the other way round; DeepSpeed's residual layer, a dense block beside one
                expert (23 of them); and both, its PR-MoE
    hunger      the dense model and the MoE, trained on an eighth of the documents
    upcycling   a dense model upcycled half-way, with the moments of AdamW carried over; an MoE of
                the same shape from scratch; the dense model itself is in "rates"

Every model starts at the same output scale: see `moe_ref.model.fold_scale`. Training reads code,
prose and incidents, in shares of their size, and no token much more than once, but for "hunger".
"""

import argparse
import hashlib
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from tiny import MODELS, TRAINING

from moe_ref import Transformer, TransformerConfig, training
from moe_ref.course import corpora
from moe_ref.model import fold_scale, upcycle

FILE = Path(__file__).parents[1] / "data" / "measurements" / "experiments.csv"
DENSE, MOE = MODELS["dense"], MODELS["moe"]
PAIR = (("MoE", MOE), ("dense", DENSE))
DOMAINS = ("code", "prose", "incidents")
MIX = {name: corpora.manifest()["domains"][name]["tokens"] for name in DOMAINS}
RATES = (2e-3, 4e-3, 8e-3, 16e-3)  # all for the first seed, the best for all
BATCH, SEQ = 16, 128


def moe(
    n_experts: int | tuple[int, ...], k: int = 2, d_ff: int = MOE.d_ff, d_shared: int = 0
) -> TransformerConfig:
    config = replace(MOE, n_experts=n_experts, k=k, d_ff=d_ff, d_shared=d_shared)
    return replace(config, router_options={"scale": k**0.5})


def residual(n_experts: int | tuple[int, ...]) -> TransformerConfig:
    """A dense block beside one expert, each as wide as one of the two experts of the MoE."""
    config = replace(moe(n_experts, k=1, d_shared=MOE.d_ff), router="switch", router_options={})
    return replace(config, shared_mix="softmax")


@dataclass(frozen=True)
class Run:
    experiment: str
    name: str
    config: TransformerConfig
    seed: int
    lr: float = TRAINING.lr
    share: float = 1.0  # of the documents to train on
    upcycle: bool = False  # train a dense model for half of the steps, then upcycle it


def plan(seeds: int) -> list[Run]:
    """All runs, experiment after experiment."""
    quarter = MOE.d_ff // 4
    growing = (8, 16, 32, 40)  # 96 in all, as four layers of 24 have
    wide = moe(MOE.n_experts, d_ff=DENSE.d_ff)  # what upcycling gives: twice the active FLOPs
    made = (
        *(("rates", f"{lr:g} {name}", config, {"lr": lr}) for lr in RATES for name, config in PAIR),
        ("experts", "24 unscaled", replace(MOE, router_options={}), {}),
        *(("experts", str(n), moe(n), {}) for n in (64, 8)),
        ("fine", "fine", moe(32, k=8, d_ff=quarter), {}),
        ("fine", "fine + shared", moe(31, k=7, d_ff=quarter, d_shared=quarter), {}),
        ("pyramid", "pyramid", moe(growing), {}),
        ("pyramid", "upside down", moe(growing[::-1]), {}),
        ("pyramid", "residual", residual(MOE.n_experts - 1), {}),
        ("pyramid", "both", residual(tuple(n - 1 for n in growing)), {}),
        ("upcycling", "upcycled", wide, {"upcycle": True}),
        ("upcycling", "scratch", wide, {}),
        *(("hunger", name, config, {"share": 0.125}) for name, config in PAIR),
    )
    runs = [Run(*about, seed, **options) for *about, options in made for seed in range(seeds)]
    return [run for run in runs if run.seed == 0 or run.lr == TRAINING.lr]


def carry_out(run: Run, steps: int) -> dict:
    """Train one model and return its line of the file."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    config = replace(TRAINING, steps=steps, warmup=steps // 10, lr=run.lr, evaluate_every=0)
    config = replace(config, checkpoint_every=0)
    model = equally_strong(fold_scale(Transformer(DENSE if run.upcycle else run.config)))
    switch = steps // 2 if run.upcycle else -1
    optimizer = training.make_optimizer(model, config)
    data = corpora.batches(some_documents(run.share), batch=BATCH, seq=SEQ, seed=run.seed, mix=MIX)
    seconds = 0.0
    for step in range(steps):
        if step == switch:
            model, optimizer = upcycled(model, optimizer, run, config)
        seconds += training.update(model, optimizer, [next(data)], config, step)["seconds"]
    losses = corpora.held_out_losses(model, DOMAINS, seq=SEQ)
    return {
        "experiment": run.experiment,
        "run": run.name,
        "seed": run.seed,
        "step": steps,
        "tokens": steps * BATCH * SEQ,
        "seconds": round(seconds, 1),
        "loss": round(corpora.mean_loss(losses), 4),
        **{domain: round(loss, 4) for domain, loss in losses.items()},
    }


def equally_strong(model: Transformer) -> Transformer:
    """The shared expert is one of k + 1 answers of equal strength, and all have a dense output.

    Beside one expert both have a share of a half, which a factor of sqrt(2) makes up for.
    """
    config = model.config
    if config.shared_mix:
        with torch.no_grad():
            for block in model.blocks:
                for down in (block.mlp.shared.down.weight, block.mlp.experts.down):
                    down.mul_(2**0.5)
    elif config.d_shared:
        with torch.no_grad():
            for block in model.blocks:
                block.mlp.shared.down.weight.mul_((config.k + 1) ** -0.5)
                block.mlp.experts.down.mul_((config.k / (config.k + 1)) ** 0.5)
    return model


def upcycled(
    dense: Transformer,
    optimizer: torch.optim.Optimizer,
    run: Run,
    config: training.TrainingConfig,
) -> tuple[Transformer, torch.optim.Optimizer]:
    """The MoE that goes on from a dense model, with a copy of AdamW's moments for each expert."""
    model = upcycle(dense, run.config.n_experts, k=run.config.k)
    carried = training.make_optimizer(model, config)
    new = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        stacked = name.replace("mlp.", "mlp.experts.").removesuffix(".weight")
        target = new[name] if name in new else new[stacked]
        carried.state[target] = {
            key: value if value.ndim == 0 else value.expand_as(target).clone()
            for key, value in optimizer.state[parameter].items()
        }
    return model, carried


def some_documents(share: float) -> dict[str, tuple[str, ...]]:
    """A share of the documents of each domain, chosen by their own hash."""

    def chosen(text: str) -> bool:
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        return int.from_bytes(digest[8:16], "big") < share * 2**64

    return {name: tuple(filter(chosen, corpora.documents(name))) for name in DOMAINS}


def missing(runs: list[Run]) -> Iterator[Run]:
    """The runs that the file has no lines of."""
    done = set()
    if FILE.exists():
        table = pd.read_csv(FILE, dtype={"run": str})
        done = set(zip(table["experiment"], table["run"], table["seed"], strict=True))
    return (run for run in runs if (run.experiment, run.name, run.seed) not in done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = list(dict.fromkeys(run.experiment for run in plan(1)))
    parser.add_argument("experiments", nargs="*", help=f"{', '.join(known)}; none: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if unknown := set(options.experiments) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
    wanted = options.experiments or known
    runs = [run for run in missing(plan(options.seeds)) if run.experiment in wanted]
    FILE.parent.mkdir(exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        waiting = [(run, pool.apply_async(carry_out, (run, options.steps))) for run in runs]
        for run, result in waiting:
            pd.DataFrame([result.get()]).to_csv(
                FILE, mode="a", header=not FILE.exists(), index=False
            )
            print(run.experiment, run.name, "seed", run.seed, flush=True)
    table = pd.read_csv(FILE, dtype={"run": str})
    table.sort_values(["experiment", "run", "seed"]).to_csv(FILE, index=False)
    print(table.groupby(["experiment", "run"])["loss"].agg(["mean", "std", "count"]).round(3))


if __name__ == "__main__":
    main()
