"""A training run's own checkpoints, each a safetensors file: the latest and the one before it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .._files import read_tensors, write_tensors

LATEST, BEFORE = "training.safetensors", "training.before.safetensors"


def write_next(folder: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write the next checkpoint of a run, tensors and texts, and keep the one before it.

    Raises:
        OSError: if it can't be written; then both checkpoints are as they were.
    """
    fresh, latest = folder / "training.fresh.safetensors", folder / LATEST
    write_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, fresh, about)
    if latest.exists():
        latest.replace(folder / BEFORE)
    fresh.replace(latest)


def read_last(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and texts of the last checkpoint of a run; None if there is none.

    Raises:
        ValueError: if it is damaged; the message says how to go on.
    """
    path = next((p for p in (folder / LATEST, folder / BEFORE) if p.exists()), None)
    if path is None:
        return None
    try:
        tensors = read_tensors(path)
    except ValueError as error:
        hint = "delete it to start afresh"
        if path.name == LATEST and (folder / BEFORE).exists():
            hint = f"delete it to go on from the one before it, {folder / BEFORE}"
        raise ValueError(f"{error}; {hint}") from error
    with safe_open(path, "pt") as file:
        return tensors, dict(file.metadata() or {})


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything but its batch that the next step depends on: weights, moments, random state."""
    tensors = {f"model.{name}": tensor for name, tensor in own_tensors(model).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Give the model, its optimiser and the random generators a `state` back."""
    with torch.no_grad():
        for name, tensor in own_tensors(model).items():
            tensor.copy_(tensors[f"model.{name}"])
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        for key in (key for key in tensors if key.startswith(prefix)):
            value = tensors[key].to(parameter.device)
            optimizer.state[parameter][key.removeprefix(prefix)] = value
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once: a tied head is the embedding."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def check_same(kept: Mapping[str, Any], wanted: Mapping[str, Any], folder: object) -> None:
    """Raise a ValueError that names the first setting in which the run in `folder` differs."""
    for name, value in wanted.items():
        if kept.get(name) != value:
            raise ValueError(
                f"{folder} holds a run with {name}={kept.get(name)!r}, not {value!r}:"
                " give it another folder, or the same configuration"
            )
