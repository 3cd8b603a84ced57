"""Keys and values in blocks of one pool, which sequences take as they grow, and share."""

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from ._validate import check_sizes
from .blocks import Blocks, Plan
from .kv_cache import cache_sizes, next_positions


class PagedCache(Blocks):
    """Keys and values of sequences that come and go, within a budget of bytes.

    The methods of `Blocks` open, fork, cut and free sequences; `batch` makes those of a forward
    pass a `KVCache`. Logits are to the bit those of a `ContiguousCache` that holds the same keys,
    if a head has a multiple of 16 bytes; torch's products of others round by where they stand in
    memory. A prefix found in the pool has the keys of the pass that stored it, which are those of
    another pass to rounding: products of other numbers of rows may round otherwise.

    Layers with a window keep all tokens, as in a `ContiguousCache`. After a change of the model's
    weights make a new pool, as what is stored was computed from the old ones.

    Args:
        config: the `TransformerConfig` of the model it is for.
        memory: bytes that the keys and values may take; whole blocks of them are used, at once.
        block: tokens in a block.
        device, dtype: those of the model.

    Attributes:
        store: the keys and values, [n_layers, 2 kv_heads, n_blocks, block * head_features]; of the
            heads, those of keys come first.
        block_bytes: of one block, in all layers.

    Raises:
        ValueError: if the budget is less than one block.

    Example:
        >>> model = Transformer(TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48))
        >>> pool, prompt = PagedCache(model.config, memory=2**16, block=4), [3, 1, 4, 1, 5]
        >>> pool.open("a", prompt)
        0
        >>> prefill = model(torch.tensor([prompt]), cache=pool.batch(["a"]))
        >>> pool.open("b", [*prompt, 9])  # its first block is there
        4
        >>> pool.append("a", [2])
        >>> mask = torch.tensor([[True, False], [True, True]])
        >>> both = model(torch.tensor([[2, 0], [5, 9]]), mask=mask, cache=pool.batch(["a", "b"]))
        >>> pool.table("a"), pool.table("b")
        ([0, 1], [0, 2])
    """

    def __init__(
        self,
        config: Any,
        *,
        memory: int,
        block: int = 16,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_sizes(memory=memory, block=block)
        heads, features = 2 * config.kv_heads, block * config.head_features
        self.block_bytes = config.n_layers * heads * features * dtype.itemsize
        if memory < self.block_bytes:
            raise ValueError(
                f"memory={memory} is less than one block of block={block} tokens,"
                f" {self.block_bytes} bytes"
            )
        super().__init__(memory // self.block_bytes, block)
        self.config = config
        # Zeros: an unseen value has weight 0, but fresh memory may hold NaN, and 0 * NaN is NaN.
        shape = (config.n_layers, heads, self.n_blocks, features)
        self.store = torch.zeros(shape, device=device, dtype=dtype)

    def batch(self, sequences: Iterable[Hashable]) -> "PagedBatch":
        """The cache of a forward pass over these sequences, a row for each, in this order.

        It serves further passes too, until one of the sequences changes in another way. Lowering
        one of its `lengths` is `truncate`.

        Raises:
            ValueError: if there is none, or one is not open or named twice.
        """
        return PagedBatch(self, sequences)


class PagedBatch:
    """Some sequences of a `PagedCache`, as a `KVCache`; `PagedCache.batch` makes it.

    Example:
        >>> pool = PagedCache(TransformerConfig(100, 32, 2, n_heads=4, d_ff=48), memory=2**16)
        >>> pool.open("a")
        0
        >>> pool.batch(["a"])
        PagedBatch(['a'], lengths=[0])
    """

    def __init__(self, pool: PagedCache, sequences: Iterable[Hashable]) -> None:
        self.pool, self.sequences = pool, tuple(sequences)
        if not self.sequences:
            raise ValueError("sequences=() are none: a batch needs one at least")
        for row, sequence in enumerate(self.sequences):
            if sequence in self.sequences[:row]:
                raise ValueError(f"sequence {sequence!r} is in the batch twice")
        self._held = [pool.length(sequence) for sequence in self.sequences]
        self.lengths = torch.tensor(self._held, dtype=torch.long)
        store = pool.store
        self.made_for = cache_sizes(pool.config, len(self._held), store.dtype, store.device)

    def begin(self, seq: int, mask: Bool[Tensor, "batch seq"] | None) -> None:
        pool, block, device = self.pool, self.pool.block, self.pool.store.device
        self._set_back()
        new = [seq] * len(self._held) if mask is None else mask.sum(dim=1).tolist()
        self._plan = pool.plan(dict(zip(self.sequences, new, strict=True)))
        _prepare(pool.store, self._plan, block)
        rows = self._plan.tables.values()
        width = max(1, *map(len, rows))
        # Rows are filled up with their own last block: one that another row owns may hold NaN.
        table = torch.from_numpy(np.array([r + (r[-1:] or [0]) * (width - len(r)) for r in rows]))
        at = next_positions(self.lengths, seq, mask)
        places = (table.gather(1, at // block) * block + at % block).flatten()
        self._new: Tensor | None = None
        if mask is not None:
            self._new = mask.flatten().nonzero()[:, 0]
            places = places[self._new]
            self._new = self._new.to(device)
        self._places, self._table = places.to(device), table.flatten().to(device)
        self._total = max(1, *self._plan.ends.values())

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.pool.check_current(self._plan)
        store, features = self.pool.store[layer], keys.shape[-1]
        new = torch.stack([keys, values]).transpose(1, 2).reshape(len(store), -1, features)
        if self._new is not None:
            new = new.index_select(1, self._new)
        store.view(len(store), -1, features).index_copy_(1, self._places, new.to(store.dtype))
        held = store.index_select(1, self._table)
        held = held.view(2, keys.shape[1], len(self._held), -1, features).transpose(1, 2)
        return held[0, :, :, : self._total], held[1, :, :, : self._total]

    def commit(self) -> None:
        self.pool.commit(self._plan)
        self._held = list(self._plan.ends.values())
        self.lengths = torch.tensor(self._held, dtype=torch.long)

    def _set_back(self) -> None:
        """Bring the pool to `lengths`, where they were lowered."""
        for sequence, held in zip(self.sequences, self._held, strict=True):
            if self.pool.length(sequence) != held:
                raise ValueError(f"sequence {sequence!r} has changed: make its batch anew")
        for row, length in enumerate(self.lengths.tolist()):
            if length != self._held[row]:
                self.pool.truncate(self.sequences[row], length)
                self._held[row] = length

    def __repr__(self) -> str:
        return f"PagedBatch({list(self.sequences)}, lengths={self.lengths.tolist()})"


def _prepare(store: Tensor, plan: Plan, block: int) -> None:
    """Copy what a step will write while others read it, and wipe what it will fill in part."""
    taken = set(plan.taken) - {target for _, target in plan.copies}
    partly = (plan.tables[s][-1] for s, end in plan.ends.items() if end % block)
    wiped = [number for number in partly if number in taken]
    if plan.copies:
        source, target = torch.tensor(plan.copies, device=store.device).T
        store[:, :, target] = store[:, :, source]
    if wiped:
        store[:, :, wiped] = 0
