"""Train the two models of `data/`: a small MoE, and its dense twin of equal active FLOPs.

    python scripts/tiny.py                     # both, into data/; about 40 minutes each on one core
    python scripts/tiny.py moe --steps 100 --seed 1 --folder build/tiny

Both see the same batches in the same order. A run that was interrupted goes on from its last
checkpoint, in build/. What comes out: the weights in bfloat16 in Hugging Face's format, the
tokenizer, the history of the run and its held-out losses as CSV, and a model card with losses,
loads and samples.
"""

import argparse
import dataclasses
import platform
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from moe_ref import Transformer, TransformerConfig, checkpoints, generation, training
from moe_ref._files import write_text
from moe_ref.course import corpora
from moe_ref.model import fold_scale
from moe_ref.telemetry import RoutingStats

DATA = Path(__file__).parents[1] / "data"
COMMON = {"vocab_size": 2048, "d_model": 96, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2}
MODELS = {
    # The scale gives the MoE the output of a dense block at the start; `fold_scale` moves it
    # into the weights, as the format of the checkpoint has no scale.
    "moe": TransformerConfig(
        **COMMON, d_ff=192, n_experts=24, k=2, router_options={"scale": 2**0.5}, tied=True
    ),
    "dense": TransformerConfig(**COMMON, d_ff=384, tied=True),
}
DOMAINS = (*corpora.DOMAINS, *corpora.LARGE)
# Shares of the size, so that every token is read about once, but those of the languages of an
# interface about four times: there is little of them, and notebook 08 asks who serves them.
SIZES = {name: entry["tokens"] for name, entry in corpora.manifest()["domains"].items()}
MIX = {name: SIZES[name] * (4 if name in corpora.LANGUAGES else 1) for name in DOMAINS}
WINDOW = {"batch": 32, "seq": 128}
WINDOWS = 64  # of each domain, that an evaluation during training reads
TRAINING = training.TrainingConfig(
    steps=3500,
    lr=8e-3,  # the best of four for both: `experiments.py rates`
    warmup=200,
    balance={"switch": 0.01, "z": 0.001},
    evaluate_every=250,
    checkpoint_every=50,
)
# No space at the end: the token of a word begins with the space before it.
PROMPTS = {
    "code": "import",
    "prose": "The function returns",
    "french": "Erreur",
    "russian": "Настройки",
    "japanese": "ファイル",
    "chinese": "无法",
    "incidents": "I am sorry to hear about",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--steps", type=int, default=TRAINING.steps)
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument("--folder", type=Path, default=DATA)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(MODELS)}")
    config = dataclasses.replace(TRAINING, steps=options.steps)
    batches = partial(corpora.batches, DOMAINS, **WINDOW, seed=options.seed, mix=MIX)
    evaluate = partial(corpora.held_out_losses, domains=DOMAINS, **WINDOW, limit=WINDOWS)
    for name in options.models:
        folder = options.folder / f"tiny-{name}"
        torch.manual_seed(options.seed)
        model = fold_scale(Transformer(MODELS[name])).to(options.device)
        run = Path("build") / f"tiny-{name}-{options.seed}-{options.steps}"
        history = training.train(model, batches, config, evaluate=evaluate, folder=run)
        tokenizer = corpora.data_file("tokenizer.json")
        checkpoints.save(model.cpu(), folder, dtype=torch.bfloat16, tokenizer=tokenizer)
        thinned(history).to_csv(folder / "history.csv", index=False, float_format="%.5g")
        history.held_out().to_csv(folder / "held_out.csv", float_format="%.4f")
        stored = checkpoints.load(folder, dtype=torch.float32)
        losses = corpora.held_out_losses(stored, DOMAINS, **WINDOW)
        table = pd.DataFrame({"loss": losses}).rename_axis("domain")
        table.to_csv(folder / "losses.csv", float_format="%.4f")
        card = model_card(name, stored, config, options.seed, history, losses)
        write_text(card, folder / "README.md")
        print(card)


def thinned(history: training.History) -> pd.DataFrame:
    """A row for ten steps: their means, and the number of the last one."""
    steps = history.to_frame()
    last = 10 * ((steps["step"] + 9) // 10)
    return steps.drop(columns="step").groupby(last).mean().reset_index()


def model_card(
    name: str,
    model: Transformer,
    config: training.TrainingConfig,
    seed: int,
    history: training.History,
    losses: dict[str, float],
) -> str:
    """What the model is, how it was made, and what it can do, in Markdown."""
    stored = sum(parameter.numel() for parameter in model.parameters())
    seconds = sum(step["seconds"] for step in history.steps)
    tokens = config.steps * WINDOW["batch"] * WINDOW["seq"]
    lines = [
        f"# tiny-{name}",
        "",
        f"A decoder of {stored:,} parameters, trained from scratch on the text described in",
        "`data/README.md` (`moe_ref.course.corpora`), by `python scripts/tiny.py " + name + "`.",
        "",
        f"- {model.config}",
        *made_with(config, seed),
        f"- {tokens:,} tokens read, {seconds:,.0f} s of training steps; torch {torch.__version__},"
        f" {torch.get_num_threads()} threads, {platform.machine()}",
        "",
        "Loss of the weights as stored, in nats per token, over all held-out text of each domain;",
        "and over all domains, weighted by their held-out tokens, without the four languages:",
        "",
        "| " + " | ".join([*losses, "all"]) + " |",
        "|" + "--:|" * (len(losses) + 1),
        "| " + " | ".join(f"{x:.3f}" for x in [*losses.values(), corpora.mean_loss(losses)]) + " |",
    ]
    if model.config.n_experts:
        lines += [
            "",
            "Share of the assignments that each expert gets, in the seven smaller domains:",
            "",
            *loads(model),
        ]
    lines += ["", "Greedy continuations of a prompt of each domain:", ""]
    lines += [f"- {domain}: `{said}`" for domain, said in samples(model).items()]
    return "\n".join(lines) + "\n"


def made_with(config: training.TrainingConfig, seed: int) -> list[str]:
    """Two lines of the card: how the model was trained, and on what."""
    text = ", ".join(f"{name}={value}" for name, value in WINDOW.items())
    return [f"- {config}", f"- corpora.batches({DOMAINS}, {text}, seed={seed}, mix={MIX})"]


@torch.no_grad()
def loads(model: Transformer) -> list[str]:
    """A table of the load of each expert, layer by layer, and how uneven it is."""
    layers = [RoutingStats(model.config.n_experts) for _ in model.blocks]
    for batch in corpora.sweep(corpora.DOMAINS, **WINDOW):
        for stats, routing in zip(layers, model(batch.inputs, mask=batch.mask).routings):
            stats.update(routing)
    experts = range(model.config.n_experts)
    table = ["| layer | " + " | ".join(map(str, experts)) + " | max / mean |"]
    table += ["|" + "--:|" * (model.config.n_experts + 2)]
    for i, stats in enumerate(layers):
        shares = (stats.overall.served / stats.overall.served.sum()).tolist()
        cells = " | ".join(f"{100 * share:.1f}%" for share in shares)
        table.append(f"| {i} | {cells} | {stats.overall.imbalance:.2f} |")
    return table


def samples(model: Transformer) -> dict[str, str]:
    """What the model says after each prompt, as one line."""
    said = {}
    for domain, prompt in PROMPTS.items():
        ids = torch.tensor([[corpora.END, *corpora.tokenizer().encode(prompt).ids]])
        tokens = generation.generate(model, ids, 40, stop=corpora.END)[0, 1:].tolist()
        text = corpora.tokenizer().decode([token for token in tokens if token != corpora.END])
        said[domain] = text.replace("\n", "⏎").replace("`", "'")
    return said


if __name__ == "__main__":
    main()
