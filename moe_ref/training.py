"""The training loop: next-token loss and balance losses in, a `History` and weights out.

Batch number i and learning rate number i depend on i alone, and a checkpoint holds the rest
(weights, moments, random state, history), so that a run that was killed and resumed has the same
weights, bit for bit, as one that was not.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import balance
from .checkpoints import read_last, write_next
from .course.text import corpora
from .ffn import check_sizes
from .layer import MoELayer
from .model import Transformer
from .routing import Routing

Domains = Sequence[str] | Mapping[str, Sequence[str]]

LOSSES: dict[str, Callable[[Routing, int], Tensor]] = {
    "importance": lambda routing, seq: balance.importance_loss(routing),
    "load": lambda routing, seq: balance.load_loss(routing),
    "switch": lambda routing, seq: balance.switch_loss(routing),
    "z": lambda routing, seq: balance.z_loss(routing),
    "sequence": lambda routing, seq: balance.sequence_loss(routing, seq=seq),
}


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Args:
        steps: updates of the weights.
        batch, seq: sequences of a batch, and tokens of each.
        accumulate: batches whose gradients are added up for one update.
        lr: highest learning rate, reached after `warmup` steps; it falls as a cosine to
            `final_lr` * lr at the last.
        weight_decay: of the matrices; norms and biases are free of it.
        betas: of AdamW.
        clip: largest norm of the gradient.
        autocast: whether to multiply in bfloat16, weights staying as they are.
        balance: coefficient of each loss of `LOSSES` to add, summed over the MoE blocks.
        bias_rate: step of `balance.update_bias`; 0: none.
        evaluate_every: steps between evaluations, the last step included; 0: never.
        evaluate_windows: windows of each domain an evaluation reads; None: all.
        checkpoint_every: steps between checkpoints, the last step included; 0: never.
        weights: share of each domain in a batch; None: equal.
        seed: of the data.

    Raises:
        ValueError: if a number is out of range or a loss unknown.
    """

    steps: int
    batch: int = 16
    seq: int = 128
    accumulate: int = 1
    lr: float = 3e-3
    warmup: int = 50
    final_lr: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    autocast: bool = False
    balance: Mapping[str, float] = field(default_factory=lambda: {"switch": 0.01})
    bias_rate: float = 0.0
    evaluate_every: int = 0
    evaluate_windows: int | None = 16
    checkpoint_every: int = 0
    weights: Mapping[str, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(steps=self.steps, batch=self.batch, seq=self.seq, accumulate=self.accumulate)
        for name in self.balance:
            if name not in LOSSES:
                raise ValueError(f"balance names {name!r}, which is none of {', '.join(LOSSES)}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be more than 0")
        for name in ("warmup", "final_lr", "weight_decay", "bias_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        for name in ("evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")

    def lr_at(self, step: int) -> float:
        """Learning rate of the update after `step` updates."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        cosine = (1 + math.cos(math.pi * min(done, 1.0))) / 2
        return self.lr * (self.final_lr + (1 - self.final_lr) * cosine)


@dataclass
class History:
    """What happened: one record for each step, and one for each domain of each evaluation."""

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def to_frame(self) -> Any:
        """A pandas table, a row for each step: losses, load imbalance, dropped share, speed."""
        import pandas

        return pandas.DataFrame(self.steps)

    def by_domain(self) -> Any:
        """Held-out losses, nats per token: a pandas table, steps by domains."""
        import pandas

        table = pandas.DataFrame(self.evaluations)
        order = list(dict.fromkeys(table["domain"]))
        return table.pivot(index="step", columns="domain", values="loss")[order]


def train(
    model: Transformer,
    domains: Domains,
    config: TrainingConfig,
    *,
    folder: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Train a model in place, going on from the checkpoint in `folder` if there is one.

    Args:
        model: on the device to train on; it is left in training mode.
        domains: names from `corpora.DOMAINS`, or a mapping from names to documents.
        config: how.
        folder: for checkpoints, `training.safetensors` and the one before it.
        progress: whether to show a bar.

    Raises:
        ValueError: if the checkpoint is damaged, or of another model or configuration.
        FloatingPointError: if loss or gradient are not finite; the weights are those before.
        OSError: if a checkpoint can't be written; the last one is as it was.
    """
    if config.checkpoint_every and folder is None:
        raise ValueError(f"checkpoint_every={config.checkpoint_every} needs a folder")
    optimizer = make_optimizer(model, config)
    history, first = History(), 0
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        first = resume(Path(folder), model, optimizer, config, history)
    data = corpora.batches(
        domains,
        batch=config.batch,
        seq=config.seq,
        seed=config.seed,
        start=first * config.accumulate,
        weights=config.weights,
    )
    model.train()
    bar = _bar(first, config.steps, progress)
    for step in range(first, config.steps):
        batches = [next(data) for _ in range(config.accumulate)]
        record = update(model, optimizer, batches, config, step)
        history.steps.append(record)
        bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
        bar.update()
        if _due(step, config.evaluate_every, config.steps):
            limit = config.evaluate_windows
            losses = evaluate(model, domains, batch=config.batch, seq=config.seq, limit=limit)
            for domain, loss in losses.items():
                history.evaluations.append({"step": step + 1, "domain": domain, "loss": loss})
        if folder is not None and _due(step, config.checkpoint_every, config.steps):
            keep(Path(folder), model, optimizer, config, history)
    bar.close()
    return history


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2017, 1711.05101), matrices apart from norms and biases."""
    named = list(model.named_parameters())
    free = [p for name, p in named if p.ndim < 2 or name.endswith("bias")]
    matrices = [p for name, p in named if not (p.ndim < 2 or name.endswith("bias"))]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def update(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[corpora.Batch],
    config: TrainingConfig,
    step: int,
) -> dict[str, float]:
    """One update of the weights; returns the record of the step."""
    begin = perf_counter()
    device = next(model.parameters()).device
    record: dict[str, float] = {"step": step + 1, "lr": config.lr_at(step)}
    demands = [torch.zeros((), dtype=torch.long, device=device)] * model.config.n_layers
    for batch in batches:
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
            output = model(inputs)
            loss = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
        terms = {"loss": loss} | balance_losses(output.routings, config)
        total = loss + sum(config.balance[name] * terms[name] for name in terms if name != "loss")
        (total / len(batches)).backward()
        for name, term in terms.items():
            record[name] = record.get(name, 0.0) + term.item() / len(batches)
        demands = [sum + routing.demand for sum, routing in zip(demands, output.routings)]
        record |= traffic(output.routings)
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
        move_biases(model, output.routings, demands, config.bias_rate)
    tokens = sum(batch.targets.numel() for batch in batches)
    record["grad_norm"] = norm.item()
    record["seconds"] = perf_counter() - begin
    record["tokens_per_second"] = tokens / record["seconds"]
    return record


def balance_losses(routings: Sequence[Routing], config: TrainingConfig) -> dict[str, Tensor]:
    """Each balance loss of the configuration, summed over the MoE blocks."""
    if not routings:
        return {}
    return {
        name: torch.stack([LOSSES[name](routing, config.seq) for routing in routings]).sum()
        for name in config.balance
    }


def traffic(routings: Sequence[Routing]) -> dict[str, float]:
    """Load imbalance (busiest expert over mean, the worst block's) and mean share of drops."""
    if not routings:
        return {}
    imbalance = [float(r.load.max() * r.n_experts) for r in routings]
    dropped = [float(r.dropped_fraction) for r in routings]
    return {"imbalance": max(imbalance), "dropped": sum(dropped) / len(dropped)}


def move_biases(
    model: Transformer, routings: Sequence[Routing], demands: Sequence[Tensor], rate: float
) -> None:
    """`balance.update_bias` for each router, with the demand of all batches of the step."""
    layers = [block.mlp for block in model.blocks if isinstance(block.mlp, MoELayer)]
    for layer, routing, demand in zip(layers, routings, demands, strict=True):
        balance.update_bias(layer.router, dataclasses.replace(routing, demand=demand), rate)


@torch.no_grad()
def evaluate(
    model: Transformer,
    domains: Domains,
    *,
    batch: int = 16,
    seq: int = 128,
    limit: int | None = None,
) -> dict[str, float]:
    """Mean held-out loss of each domain, nats per token; the model's mode and weights stay."""
    mode, device = model.training, next(model.parameters()).device
    names = list(domains)
    losses, tokens = torch.zeros(2, len(names), dtype=torch.float64)
    model.eval()
    for part in corpora.sweep(domains, batch=batch, seq=seq, limit=limit):
        mask = part.mask.to(device)
        logits = model(part.inputs.to(device), mask=mask).logits
        graded = F.cross_entropy(logits.mT, part.targets.to(device), reduction="none") * mask
        losses.index_add_(0, part.domains, graded.double().sum(dim=1).cpu())
        tokens.index_add_(0, part.domains, mask.double().sum(dim=1).cpu())
    model.train(mode)
    return dict(zip(names, (losses / tokens).tolist(), strict=True))


# ---------------------------------------------------------------- checkpoints of a run


def keep(
    folder: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    history: History,
) -> None:
    """Write all that the rest of the run depends on; the checkpoint before this one stays."""
    tensors = {f"model.{name}": tensor for name, tensor in own_tensors(model).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    about = {"run": json.dumps(_about(model, config)), "history": json.dumps(vars(history))}
    write_next(folder, tensors, about)


def resume(
    folder: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    history: History,
) -> int:
    """Go back to the last checkpoint; returns the steps done, 0 if there is none."""
    last = read_last(folder)
    if last is None:
        return 0
    tensors, about = last
    _compare(json.loads(about["run"]), _about(model, config), folder)
    with torch.no_grad():
        for name, tensor in own_tensors(model).items():
            tensor.copy_(tensors[f"model.{name}"])
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (value := tensors.get(f"optimizer.{name}.{key}")) is not None:
                optimizer.state[parameter][key] = value.to(parameter.device)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    vars(history).update(json.loads(about["history"]))
    return len(history.steps)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once: a tied head is the embedding."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _about(model: Transformer, config: TrainingConfig) -> dict[str, Any]:
    described = {"model": dataclasses.asdict(model.config), "training": dataclasses.asdict(config)}
    return json.loads(json.dumps(described))  # tuples become lists, as in the file


def _compare(kept: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    for part in ("model", "training"):
        for name, value in asked[part].items():
            if kept[part].get(name) != value:
                raise ValueError(
                    f"{folder} holds a run with {name}={kept[part].get(name)!r}, not {value!r}:"
                    " give it another folder, or the same configuration"
                )


def _due(step: int, every: int, steps: int) -> bool:
    return every > 0 and ((step + 1) % every == 0 or step + 1 == steps)


def _bar(first: int, steps: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(initial=first, total=steps, unit="step", disable=not progress)
