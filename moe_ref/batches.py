"""Batches of tokens, and a model's loss on them."""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from .model import Output, Transformer, evaluating

UNGRADED = -100  # the target of a token that is read but not graded, as in torch's cross_entropy


@dataclass(frozen=True)
class Batch:
    """Sequences to train or to evaluate on.

    Args:
        inputs: tokens to read.
        targets: the token after each; `UNGRADED` where the model is not to be graded.
        mask: False at padding, which is neither routed nor graded; None: there is none.

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
    """What is read of a batch: any class with these three will do, such as `Batch`."""

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
        >>> model, tokens = Transformer(TransformerConfig(9, 16, 1, 2, 16)), torch.arange(9)[None]
        >>> held_out_loss(model, [Batch(tokens[:, :-1], tokens[:, 1:])]) < 5  # log(9) is 2.2
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
    """A model's output for a batch, and the targets on its device, `UNGRADED` at padding."""
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
    """A sha256 of everything in a batch that training reads."""
    parts = [p.cpu() for p in (batch.inputs, batch.targets, batch.mask) if p is not None]
    shapes = repr([part.shape for part in parts]).encode()
    return sha256(shapes + b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
