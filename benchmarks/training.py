"""Training steps of the MoE of scripts/tiny.py, its dense twin, and transformers' Mixtral.

    python benchmarks/training.py [--batch N] [--seq N] [--device D] [--autocast] [--seconds S]

Every step is a forward and a backward pass with the balance loss, clipping and a fused AdamW, on
the same batch. The Mixtral has the same weights, in each expert implementation of transformers,
trained by a plain loop. All take turns in one process; the median counts.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from moe_ref import Transformer, checkpoints, training
from moe_ref.course import corpora, lesson
from moe_ref.model import fold_scale

ROOT = Path(__file__).parents[1]


def models() -> dict:
    """The configurations of scripts/tiny.py."""
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "scripts" / "tiny.py")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    return tiny.MODELS


def ours(
    model: Transformer, batch: corpora.Batch, config: training.TrainingConfig
) -> Callable[[], object]:
    optimizer = training.make_optimizer(model.train(), config)
    return lambda: training.update(model, optimizer, [batch], config, config.warmup)


def theirs(
    model: nn.Module, batch: corpora.Batch, config: training.TrainingConfig
) -> Callable[[], None]:
    """The plain loop: their loss, their balance loss, the same optimiser and clipping."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=config.betas, weight_decay=0.1, fused=True
    )
    device = next(model.parameters()).device
    tokens = batch.inputs.to(device)
    model.train()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
            output = model(input_ids=tokens, labels=tokens, output_router_logits=True)
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        output.loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", action="store_true", help="multiply in bfloat16")
    parser.add_argument("--seconds", type=float, default=15, help="for each")
    options = parser.parse_args()
    config = training.TrainingConfig(steps=1000, lr=1e-4, autocast=options.autocast)
    batch = next(corpora.batches(corpora.DOMAINS, batch=options.batch, seq=options.seq))
    torch.manual_seed(0)
    shapes = models().items()
    built = {name: fold_scale(Transformer(shape)).to(options.device) for name, shape in shapes}
    runners: dict = {name: ours(model, batch, config) for name, model in built.items()}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(built["moe"], folder)
        for name in ("eager", "grouped_mm"):
            mixtral = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, experts_implementation=name
            )
            runners[f"transformers, {name}"] = theirs(mixtral.to(options.device), batch, config)
    times = lesson.race(runners, seconds=options.seconds)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}")
    print("| step of | ms | tokens per second | time / moe |\n|---|--:|--:|--:|")
    for name, seconds in times.items():
        rate = batch.targets.numel() / seconds
        print(f"| {name} | {1000 * seconds:.0f} | {rate:,.0f} | {seconds / times['moe']:.2f} |")
    best = min(time for name, time in times.items() if name.startswith("transformers"))
    print(f"\nmoe over dense {times['moe'] / times['dense']:.2f}, ", end="")
    print(f"best of transformers over moe {best / times['moe']:.2f}")


if __name__ == "__main__":
    main()
