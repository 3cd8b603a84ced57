"""Batches of tokens, and a model's loss on them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from .model import Output, Transformer

UNGRADED = -100  # the target of a token that is read but not graded, as in torch's cross_entropy


@dataclass(frozen=True)
class Batch:
    """Sequences to train on, or to be graded on.

    Args:
        inputs: tokens to read.
        targets: the token after each; `UNGRADED` where the model is not to be graded.
        mask: False at padding, which follows a sequence and is neither routed nor graded; None:
            there is no padding.

    Example:
        >>> tokens = torch.arange(6)[None]
        >>> Batch(tokens[:, :-1], tokens[:, 1:]).targets
        tensor([[1, 2, 3, 4, 5]])
    """

    inputs: Int[Tensor, "batch seq"]
    targets: Int[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"] | None = None


@runtime_checkable
class BatchLike(Protocol):
    """What is read of a batch: a `Batch` has it, and so may a class that knows more."""

    @property
    def inputs(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor | None: ...


def held_out_loss(model: Transformer, batches: Iterable[BatchLike]) -> float:
    """Mean loss over every graded target of these batches, in nats per token.

    The model reads them in evaluation mode; its weights and its mode stay as they are.

    Raises:
        ValueError: if there is no target to grade.

    Example:
        >>> from moe_ref import TransformerConfig
        >>> model, tokens = Transformer(TransformerConfig(9, 16, 1, 2, 16)), torch.arange(9)[None]
        >>> loss = held_out_loss(model, [Batch(tokens[:, :-1], tokens[:, 1:])])
        >>> 0 < loss < 5  # near log(9) = 2.2, since nothing has been learned
        True
    """
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            output, targets = read(model, batch)
            losses = F.cross_entropy(output.logits.mT, targets, reduction="none")
            total += losses.double().sum().item()
            count += graded(batch)
    if not count:
        raise ValueError("batches hold no target to grade")
    return total / count


def read(model: Transformer, batch: BatchLike) -> tuple[Output, Tensor]:
    """What a model says of a batch, and the targets, `UNGRADED` at padding, on its device."""
    device, mask, targets = next(model.parameters()).device, batch.mask, batch.targets
    if mask is not None:
        targets = targets.masked_fill(~mask, UNGRADED)
        mask = None if mask.all() else mask.to(device)
    return model(batch.inputs.to(device), mask=mask), targets.to(device)


def graded(batch: BatchLike) -> int:
    """How many targets are graded."""
    real = batch.targets != UNGRADED
    return int((real if batch.mask is None else real & batch.mask).sum())


def digest(batch: BatchLike) -> str:
    """A sha256 of all that is read of a batch."""
    parts = [p.cpu() for p in (batch.inputs, batch.targets, batch.mask) if p is not None]
    shapes = repr([part.shape for part in parts]).encode()
    return sha256(shapes + b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient; afterwards each part of the model has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
