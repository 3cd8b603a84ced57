"""Bytes of keys and values: in one stretch for each sequence, in blocks, and in shared blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._validate import check_choice, check_sizes
from .counting import BYTES, parts


@dataclass(frozen=True)
class CacheBytes:
    """What the keys and values of some sequences take.

    Attributes:
        tokens: of the tokens alone, which no cache can go below without sharing.
        contiguous: with as much room for each sequence as the one that needs most.
        paged: in blocks.
        shared: in blocks, with the full blocks of the prefix they have in common held once.

    Example:
        >>> config = TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48)
        >>> round(cache_bytes(config, [100, 20, 9], room=256).saved, 3)
        0.792
    """

    tokens: float
    contiguous: float
    paged: float
    shared: float

    @property
    def saved(self) -> float:
        """The part of the contiguous bytes that blocks and sharing save."""
        return 1 - self.shared / self.contiguous


def cache_bytes(
    model: Any,
    lengths: Sequence[int],
    *,
    room: int | None = None,
    block: int = 16,
    shared: int = 0,
    dtype: str = "bfloat16",
) -> CacheBytes:
    """Count the bytes of a `ContiguousCache` and of a `PagedCache`.

    Layers with a window count all tokens, as both caches keep them.

    Args:
        model: as in `parts`.
        lengths: tokens of each sequence.
        room: tokens that the contiguous cache has room for in each sequence. None: the longest
            of `lengths`; a service that can't know them sets aside the longest it allows.
        block: tokens in a block.
        shared: tokens that all sequences begin with.
        dtype: of the model, a key of `BYTES`; the cache has 16 bits at least.

    Raises:
        ValueError: if a number is impossible or a name unknown.

    Example:
        >>> config = TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48)
        >>> cache_bytes(config, [100, 90], block=16, shared=64)
        CacheBytes(tokens=48640.0, contiguous=51200.0, paged=53248.0, shared=36864.0)

    Source: Kwon et al. 2023 (2309.06180), section 3.1.
    """
    check_choice("dtype", dtype, BYTES)
    check_sizes(block=block)
    if not lengths or min(lengths) < 0 or max(lengths) < 1:
        raise ValueError(f"lengths={list(lengths)}: give those of one sequence or more")
    room = max(lengths) if room is None else room
    if room < max(lengths):
        raise ValueError(f"room={room} is less than the longest of lengths, {max(lengths)}")
    if not 0 <= shared <= min(lengths):
        raise ValueError(f"shared={shared} is not from 0 to the shortest length, {min(lengths)}")
    each: float = sum(part.places * part.cached for part in parts(model))
    each *= max(BYTES[dtype], BYTES["bfloat16"])
    paged = sum(-(-length // block) for length in lengths) * block
    once = (len(lengths) - 1) * (shared // block) * block
    found = (sum(lengths), len(lengths) * room, paged, paged - once)
    return CacheBytes(*(float(tokens * each) for tokens in found))
