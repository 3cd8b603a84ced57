"""The training loop: batches of tokens in, trained weights and a `History` out.

A run that was killed and resumed has the same weights, bit for bit, as one that was not: the
learning rate of step i depends on i alone, batch number i comes again when asked for, and a
checkpoint holds the rest (weights, moments, random state, history).
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import balance
from ._validate import check_sizes
from .batches import Batch as Batch
from .batches import BatchLike, digest, graded, read
from .batches import held_out_loss as held_out_loss
from .checkpoints import run
from .layer import MoELayer
from .model import Transformer, evaluating
from .routing import Routing

# What the record of a step holds beside the balance losses.
COLUMNS = {"step", "lr", "loss", "imbalance", "dropped"}
COLUMNS |= {"grad_norm", "seconds", "tokens_per_second"}


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Args:
        steps: updates of the weights.
        accumulate: batches whose gradients are added up for one update.
        lr: highest learning rate, reached after `warmup` steps; from there it falls as a cosine to
            `final_lr` * lr in the last step.
        weight_decay: of the matrices; norms and biases have none.
        betas: of AdamW.
        clip: largest norm of the gradient.
        autocast: whether to multiply in bfloat16; weights keep their dtype.
        balance: coefficients of the balance losses to add. A key is a name in `balance.LOSSES` or a
            `balance.BalanceLoss` itself.
        bias_rate: `rate` of `balance.update_bias`; 0: the biases stay.
        evaluate_every, checkpoint_every: steps between evaluations, and between checkpoints; 0:
            only the last step ends with one.

    Raises:
        ValueError: if a number is out of range or a loss unknown.

    Example:
        >>> config = TrainingConfig(steps=100, lr=0.01, warmup=10)
        >>> [round(config.lr_at(step), 4) for step in (0, 10, 99)]
        [0.001, 0.01, 0.001]
    """

    steps: int
    accumulate: int = 1
    lr: float = 3e-3
    warmup: int = 50
    final_lr: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    autocast: bool = False
    balance: Mapping[Any, float] = field(default_factory=lambda: {"switch": 0.01})
    bias_rate: float = 0.0
    evaluate_every: int = 0
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        check_sizes(steps=self.steps, accumulate=self.accumulate)
        every = "evaluate_every", "checkpoint_every"
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be more than 0")
        for name in ("warmup", "final_lr", "weight_decay", "bias_rate", *every):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        for name in COLUMNS & set(balance.resolve(self.balance)):
            raise ValueError(f"balance holds a loss called {name!r}: rename it, History has one")

    def lr_at(self, step: int) -> float:
        """Learning rate of the update after `step` updates."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        cosine = (1 + math.cos(math.pi * min(done, 1.0))) / 2
        return self.lr * (self.final_lr + (1 - self.final_lr) * cosine)


@dataclass
class History:
    """What happened: one record for each step, and one for each loss of each evaluation.

    The record of a step has the keys `COLUMNS` and the name of each balance loss, which is summed
    over the MoE blocks. `imbalance` is the demand for the busiest expert over the mean demand, in
    the worst block; `dropped` is the share of assignments that no expert served.

    Example:
        >>> History(steps=[{"step": 1, "loss": 2.5}]).to_frame()["loss"].tolist()
        [2.5]
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def to_frame(self) -> Any:
        """A pandas table, a row for each step."""
        import pandas

        return pandas.DataFrame(self.steps)

    def held_out(self) -> Any:
        """The evaluations as a pandas table: a row for each step, a column for each loss."""
        import pandas

        table = pandas.DataFrame(self.evaluations)
        order = list(dict.fromkeys(table["name"]))
        return table.pivot(index="step", columns="name", values="loss")[order]


def train(
    model: Transformer,
    batches: Callable[..., Iterable[BatchLike]],
    config: TrainingConfig,
    *,
    evaluate: Callable[[Transformer], Mapping[str, float]] | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Train a model in place, going on from the checkpoint in `folder` if there is one.

    Args:
        model: on the device to train on; it is left in training mode.
        batches: `batches(start=i)` gives batch number i, i + 1 and so on, the same each time; such
            as `functools.partial(corpora.batches, corpora.DOMAINS, batch=16, seq=128)`.
        config: the schedule, the optimiser and the balance losses.
        evaluate: `evaluate(model)` gives losses by name, for `History.held_out`. It is called in
            evaluation mode and without gradient; None: no evaluation.
        folder: for checkpoints, `training.safetensors` and the one before it; None: no checkpoint.
        progress: whether to show a bar.

    Raises:
        ValueError: if the checkpoint is damaged, or of another model, configuration or data.
        FloatingPointError: if loss or gradient are not finite; the weights are those before.
        OSError: if a checkpoint can't be written; the last one is as it was.

    Example:
        >>> model = Transformer(TransformerConfig(9, 16, 1, 2, 16, n_experts=4))
        >>> tokens = torch.arange(18).view(2, 9) % 9  # to learn to count
        >>> data, config = [Batch(tokens[:, :-1], tokens[:, 1:])] * 60, TrainingConfig(60, lr=0.01)
        >>> history = train(model, lambda start: data[start:], config, progress=False)
        >>> history.steps[0]["loss"] > 2 and held_out_loss(model, data) < 0.1
        True
    """
    if not callable(batches):
        raise ValueError(f"batches={batches!r} must be a function, called as batches(start=0)")
    if config.checkpoint_every and folder is None:
        raise ValueError(f"checkpoint_every={config.checkpoint_every} needs a folder")
    if config.evaluate_every and evaluate is None:
        raise ValueError(f"evaluate_every={config.evaluate_every} needs evaluate, a function")
    optimizer = make_optimizer(model, config)
    history, stream = _resume(folder, model, optimizer, config, batches)
    model.train()
    first = len(history.steps)
    with _bar(first, config.steps, progress) as bar:
        for step in range(first, config.steps):
            taken = list(islice(stream, config.accumulate))
            if len(taken) < config.accumulate:
                raise ValueError(f"batches end in step {step + 1} of steps={config.steps}")
            record = update(model, optimizer, taken, config, step)
            history.steps.append(record)
            if evaluate is not None and _due(step, config.evaluate_every, config.steps):
                with evaluating(model):
                    for name, loss in evaluate(model).items():
                        made = {"step": step + 1, "name": name, "loss": float(loss)}
                        history.evaluations.append(made)
            if folder is not None and _due(step, config.checkpoint_every, config.steps):
                about = {"run": _about(model, config), "history": vars(history)}
                texts = {name: json.dumps(part) for name, part in about.items()}
                texts["batch"] = digest(taken[-1])
                run.write_next(Path(folder), run.state(model, optimizer), texts)
            if bar is not None:
                bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
                bar.update()
    return history


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2017, 1711.05101), matrices apart from norms and biases."""
    matrices: list[Tensor] = []
    free: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (free if parameter.ndim < 2 or name.endswith("bias") else matrices).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def update(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[BatchLike],
    config: TrainingConfig,
    step: int,
) -> dict[str, float]:
    """Update the weights once, by the gradients of all `batches`.

    Args:
        model: in training mode.
        optimizer: from `make_optimizer`.
        batches: those whose gradients are added up.
        config: as for `train`.
        step: number of updates made before.

    Returns:
        The record of the step, for `History.steps`.

    Raises:
        ValueError: if a batch has no target to grade.
        FloatingPointError: if loss or gradient are not finite; the weights are those before.
    """
    begin = perf_counter()
    record, routings = _backward(model, batches, config)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    if not math.isfinite(record["loss"]) or not norm.isfinite():
        optimizer.zero_grad()
        raise FloatingPointError(
            f"step {step + 1}: loss {record['loss']}, norm of the gradient {norm.item()}, with"
            f" lr={config.lr_at(step):.3g}. The weights are those of step {step}; try a lower lr"
            " or a longer warmup"
        )
    for group in optimizer.param_groups:
        group["lr"] = config.lr_at(step)
    optimizer.step()
    optimizer.zero_grad()
    if config.bias_rate:
        layers = [block.mlp for block in model.blocks if isinstance(block.mlp, MoELayer)]
        for layer, routing in zip(layers, routings, strict=True):
            balance.update_bias(layer.router, routing, config.bias_rate)
    record = {"step": step + 1, "lr": config.lr_at(step)} | record
    record["grad_norm"] = norm.item()
    record["seconds"] = perf_counter() - begin
    tokens = sum(batch.targets.numel() for batch in batches)
    return record | {"tokens_per_second": tokens / record["seconds"]}


def _backward(
    model: Transformer, batches: Sequence[BatchLike], config: TrainingConfig
) -> tuple[dict[str, float], list[Routing]]:
    """Add up the gradients of the batches.

    Returns what to record, and the routings of the last batch with the demand of all.
    """
    device = next(model.parameters()).device
    losses, counts = balance.resolve(config.balance), [graded(batch) for batch in batches]
    if not all(counts):
        raise ValueError(f"batch {counts.index(0)} of the step has no target to grade")
    record, demands, dropped = {"loss": 0.0}, [], []
    for batch, count in zip(batches, counts, strict=True):
        with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
            output, targets = read(model, batch)
            loss = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
        parts = sum(counts) / count  # so that every target of the update counts alike
        record["loss"] += loss.item() / parts
        total = loss / parts
        terms = balance.sums(losses, output.routings, seq=targets.shape[1])
        for name, term in terms.items():
            total = total + losses[name][1] * term / len(batches)
            record[name] = record.get(name, 0.0) + term.item() / len(batches)
        total.backward()
        demands.append([routing.demand for routing in output.routings])
        dropped += [float(routing.dropped_fraction) for routing in output.routings]
    totals = [torch.stack(block).sum(dim=0) for block in zip(*demands, strict=True)]
    routings = [dataclasses.replace(r, demand=d) for r, d in zip(output.routings, totals)]
    if routings:
        record["imbalance"] = max(float(r.imbalance) for r in routings)
        record["dropped"] = sum(dropped) / len(dropped)
    return record, routings


def _resume(
    folder: str | Path | None,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    batches: Callable[..., Iterable[BatchLike]],
) -> tuple[History, Iterator[BatchLike]]:
    """Go back to the last checkpoint, if there is one; give its history and the batches to come."""
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    last = None if folder is None else run.read_last(Path(folder))
    if last is None:
        return History(), iter(batches(start=0))
    tensors, about = last
    run.check_same(json.loads(about["run"]), _about(model, config), folder)
    history = History(**json.loads(about["history"]))
    number = len(history.steps) * config.accumulate - 1
    stream = iter(batches(start=number))
    again = next(stream, None)  # the last batch before the checkpoint
    if again is None or digest(again) != about.get("batch"):
        raise ValueError(
            f"{folder} holds a run on other batches: batches(start={number}) does not begin with"
            f" the batch number {number} that it read. Give batches of the same text, sizes and"
            " seed, which begin with number `start`, or another folder"
        )
    run.restore(tensors, model, optimizer)
    return history, stream


def _about(model: Transformer, config: TrainingConfig) -> dict[str, Any]:
    """What a run must have in common with its checkpoint, as JSON holds it; functions by name."""
    about = dataclasses.asdict(model.config) | dataclasses.asdict(config)
    losses = balance.resolve(config.balance).items()
    about["balance"] = {name: coefficient for name, (_, coefficient) in losses}
    return json.loads(json.dumps(about, default=lambda part: getattr(part, "__name__", str(part))))


def _due(step: int, every: int, steps: int) -> bool:
    return (step + 1) % (every or steps) == 0 or step + 1 == steps


def _bar(first: int, steps: int, progress: bool) -> Any:
    if not progress:
        return nullcontext()
    from tqdm.auto import tqdm

    return tqdm(initial=first, total=steps, unit="step")
