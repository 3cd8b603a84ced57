"""The key-value cache: what attention keeps of the tokens read so far."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ._validate import check_sizes


@runtime_checkable
class KVCache(Protocol):
    """The keys and values of the tokens read so far, of every block and every sequence.

    Position p of a sequence is its token number p, counted from 0. A forward pass calls `begin`
    once, `extend` once in each block, and `commit` when all blocks are done. Until then nothing
    counts as stored, so a step that breaks half-way leaves no trace.

    Attributes:
        lengths: tokens that each sequence holds, on the CPU so that the host need not wait for a
            GPU. Lower an entry to forget the last tokens of that sequence.
        made_for: the batch and model that the cache fits, as `cache_sizes` lists them.
    """

    lengths: Int[Tensor, " batch"]
    made_for: Mapping[str, Any]

    def begin(self, seq: int, mask: Bool[Tensor, "batch seq"] | None) -> None:
        """Make room for the next tokens, or raise a ValueError that says how much there is.

        Args:
            seq: tokens of each sequence in this step, padding among them.
            mask: on the CPU, False at padding, which is not stored; None: there is none.
        """

    def extend(
        self,
        layer: int,
        keys: Float[Tensor, "batch kv_heads seq features"],
        values: Float[Tensor, "batch kv_heads seq features"],
    ) -> tuple[
        Float[Tensor, "batch kv_heads total features"],
        Float[Tensor, "batch kv_heads total features"],
    ]:
        """Store a block's keys and values of the step's tokens; return those of all tokens.

        Index p holds position p, and `total` is the length of the longest sequence, at least 1.
        Past the end of a shorter one there may be anything finite.
        """

    def commit(self) -> None:
        """Count the step."""


class ContiguousCache:
    """A `KVCache` with one stretch of memory for each sequence.

    Args:
        config: the `TransformerConfig` of the model it is for.
        batch: number of sequences.
        length: tokens that each sequence has room for.
        device, dtype: those of the model.

    Raises:
        ValueError: if a size is below 1; later, if there is no room for the tokens of a step.

    Example:
        >>> model = Transformer(TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48))
        >>> cache = ContiguousCache(model.config, batch=2, length=8)
        >>> mask = torch.tensor([[True, True, True], [True, True, False]])
        >>> prefill = model(torch.tensor([[5, 6, 7], [8, 9, 0]]), mask=mask, cache=cache)
        >>> decode = model(torch.tensor([[1], [2]]), cache=cache)  # each goes on at its own length
        >>> cache.lengths
        tensor([4, 3])
    """

    def __init__(
        self,
        config: Any,
        batch: int,
        length: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_sizes(batch=batch, length=length)
        shape = (config.n_layers, batch, config.kv_heads, length, config.head_features)
        # Zeros: an unseen value has weight 0, but fresh memory may hold NaN, and 0 * NaN is NaN.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.length = length
        self.lengths = torch.zeros(batch, dtype=torch.long)
        self.made_for: Mapping[str, Any] = cache_sizes(config, batch, dtype, self.keys.device)

    def begin(self, seq: int, mask: Bool[Tensor, "batch seq"] | None) -> None:
        self._ends = self.lengths + (seq if mask is None else mask.sum(dim=1))
        longest = int(self._ends.max())
        if longest > self.length:
            raise ValueError(f"the cache has room for length={self.length} tokens, not {longest}")
        stores = self.keys, self.values
        self._all = [store.narrow(-2, 0, max(longest, 1)) for store in stores]
        self._scattered: Int[Tensor, "3 new"] | None = None
        if mask is None and all_equal(self.lengths):
            self._new = [store.narrow(-2, longest - seq, seq) for store in stores]
        else:
            mask = torch.ones(len(self.lengths), seq, dtype=torch.bool) if mask is None else mask
            rows, columns = mask.nonzero(as_tuple=True)
            at = next_positions(self.lengths, seq, mask)[rows, columns]
            self._scattered = torch.stack([rows, columns, at]).to(self.keys.device)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self._scattered is None:
            for place, new in zip(self._new, (keys, values), strict=True):
                place[layer].copy_(new)
        else:
            rows, columns, at = self._scattered
            for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
                store[rows, :, at] = new[rows, :, columns].to(store.dtype)
        return self._all[0][layer], self._all[1][layer]

    def commit(self) -> None:
        self.lengths = self._ends

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={value}" for name, value in self.made_for.items())
        return f"ContiguousCache({sizes}, length={self.length}, lengths={self.lengths.tolist()})"


def cache_sizes(
    config: Any, batch: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What a cache and the model that reads it must agree on."""
    sizes = {name: getattr(config, name) for name in ("n_layers", "kv_heads", "head_features")}
    return {"batch": batch, **sizes, "dtype": dtype, "device": device}


def check_cache(cache: KVCache, config: Any, x: Float[Tensor, "batch seq d_model"]) -> None:
    """Raise a ValueError that names what in a cache does not fit the model or the tokens."""
    for name, value in cache_sizes(config, len(x), x.dtype, x.device).items():
        if (made_for := cache.made_for[name]) != value:
            raise ValueError(f"the cache was made for {name}={made_for}, not {name}={value}")


def next_positions(
    lengths: Int[Tensor, " batch"], seq: int, mask: Bool[Tensor, "batch seq"] | None
) -> Int[Tensor, "batch seq"]:
    """Positions of the next tokens of each sequence; padding has that of the token before it."""
    counted = torch.arange(seq)[None] if mask is None else mask.long().cumsum(dim=1) - 1
    return (lengths[:, None] + counted).clamp(min=0)


def all_equal(lengths: Int[Tensor, " batch"]) -> bool:
    """Whether all sequences are equally long, so that slices and one row of positions will do."""
    return bool((lengths == lengths[:1]).all())
