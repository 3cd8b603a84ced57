"""Prompts: the token ids of sequences of different length, side by side in one tensor."""

import operator
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

NEEDED = "give at least one token, such as the end-of-text"


def padded(
    prompt: Any, mask: Tensor | None = None
) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"] | None]:
    """The token ids of a prompt, checked, with all padding before the tokens of a sequence.

    So the last token of each sequence stands in the last column. Padding repeats its id, which is
    in the vocabulary, and which the sequence has seen.

    Args:
        prompt: a tensor of token ids, or a list with those of each sequence.
        mask: False at padding of a tensor, on either side; what stands there is not read.

    Returns:
        The tokens, and a mask that is False at padding, or None if there is none.

    Raises:
        ValueError: if these are no token ids, a sequence has none, or the mask does not fit.

    Example:
        >>> padded([[3, 1, 4], [1]])[0].tolist()
        [[3, 1, 4], [1, 1, 1]]
    """
    if isinstance(prompt, Tensor):
        tokens = _ids(prompt, "prompt", "[batch, seq]")
        if not tokens.numel():
            raise ValueError(f"the prompt is empty: {NEEDED}")
        if mask is None:
            return tokens, None
        if mask.shape != tokens.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"mask: shape {list(mask.shape)}, {mask.dtype}; the prompt asks for"
                f" {list(tokens.shape)}, torch.bool"
            )
        rows = [row[real] for row, real in zip(tokens, mask.to(tokens.device), strict=True)]
    elif isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence):
        raise _no_ids(f"prompt={reprlib.repr(prompt)} is a {type(prompt).__name__}")
    elif mask is not None:
        raise ValueError("mask is for a prompt in one tensor; sequences in a list have no padding")
    else:
        rows = [_row(sequence, f"prompt[{i}]") for i, sequence in enumerate(prompt)]
    for i, row in enumerate(rows):
        if not len(row):
            raise ValueError(f"prompt[{i}] is empty: {NEEDED}")
    if not rows:
        raise ValueError(f"the prompt is empty: {NEEDED}")
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    tokens = pad_sequence(rows, batch_first=True, padding_side="left")
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    real = columns >= tokens.shape[1] - lengths[:, None]
    return torch.where(real, tokens, tokens[:, -1:]), None if real.all() else real


def _row(sequence: Any, name: str) -> Int[Tensor, " seq"]:
    if isinstance(sequence, Tensor):
        return _ids(sequence, name, "[seq]")
    try:
        return torch.tensor([operator.index(token) for token in sequence], dtype=torch.long)
    except TypeError:
        raise _no_ids(f"{name}={reprlib.repr(sequence)} is a {type(sequence).__name__}") from None


def _ids(tokens: Tensor, name: str, shape: str) -> Tensor:
    if tokens.ndim != shape.count(",") + 1 or tokens.dtype not in (torch.int32, torch.int64):
        raise _no_ids(f"{name} holds {tokens.dtype} with shape {list(tokens.shape)}")
    return tokens.long()


def _no_ids(what: str) -> ValueError:
    return ValueError(
        f"{what}: token ids are wanted, a tensor of integers [batch, seq] or a list with those of"
        " each sequence. Encode text with a tokenizer first; prompt[None] makes one sequence a"
        " batch"
    )
