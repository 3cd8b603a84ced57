"""Slots for the experts that fit, filled when a layer asks for one, or ahead on a guess."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .._validate import check_choice, check_sizes
from ..dispatch import sorted_rows
from ..experts import Experts, run_loop
from ..ffn import autocast_dtype
from ..routing import Routing
from ..telemetry import Trace
from .fetching import Host, Shelf
from .policy import POLICIES, Key, Residents, Stats, Visit

# Experts that the next layer may want, likeliest first, from this layer's tokens and their mask.
Guess = Callable[[Tensor, Tensor], Sequence[int]]


class Pool:
    """The slots that all layers of a model share.

    One forward at a time: the bookkeeping takes no lock. A thread of its own reads ahead.

    Args:
        shelf: where the experts lie.
        like: experts of the same form; their own weights are not looked at.
        total: experts of all layers.
        resident: bytes of the slots, at most.
        policy: a name of `POLICIES`.
        hot: for "pinned": a trace that says which experts are popular.
        decay: for "lfu": as in `Residents`.
        trace: is told what each layer asks for, and what was guessed; None: nothing is recorded.
        device, dtype: of the slots.

    Raises:
        ValueError: if an expert does not fit into the budget, or another argument is impossible.

    Example:
        >>> experts = Experts(4, d_model=8, d_ff=16)
        >>> pool = Pool(Host([experts], "cpu"), experts, total=4, resident=5000)
        >>> pool.slots, pool.slot_bytes
        (3, 1536)
    """

    def __init__(
        self,
        shelf: Shelf,
        like: Experts,
        *,
        total: int,
        resident: int,
        policy: str = "lru",
        hot: Trace | None = None,
        decay: float = 0.99,
        trace: Trace | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_choice("policy", policy, POLICIES)
        check_sizes(resident=resident)
        self.slot_bytes = sum(w[0].numel() for w in like.parameters()) * dtype.itemsize
        if resident < self.slot_bytes:
            raise ValueError(
                f"resident={resident} bytes are less than one expert, {self.slot_bytes} bytes"
            )
        self.slots = min(total, resident // self.slot_bytes)
        popular = () if hot is None else hot.popular()
        self.residents = Residents(self.slots, policy, hot=popular, decay=decay)
        self.residents.stats.read_bytes = shelf.read_bytes
        self.trace, self._shelf = trace, shelf
        self._experts = [_empty(like, device, dtype) for _ in range(self.slots)]
        self._reader: ThreadPoolExecutor | None = None
        self._reading: dict[int, Future[None]] = {}  # by slot
        self._side = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None

    @property
    def stats(self) -> Stats:
        """Hits, misses and bytes so far."""
        return self.residents.stats

    def run(
        self,
        layer: int,
        rows: Float[Tensor, "rows d_model"],
        counts: Int[Tensor, " n_experts"],
    ) -> Float[Tensor, "rows d_model"]:
        """Apply a layer's experts to their rows, as `Experts` does.

        Raises:
            ValueError: if a gradient is wanted.
            OSError: if an expert can't be read. The pool is as usable as before.
        """
        if torch.is_grad_enabled() and rows.requires_grad:
            raise ValueError("experts in a Store have no gradients: use torch.no_grad()")
        rows = rows.to(autocast_dtype(rows) or rows.dtype)
        sizes = counts.tolist()
        y, asked = torch.empty_like(rows), [e for e, size in enumerate(sizes) if size]
        if self.trace is not None:
            self.trace.touched(layer, asked)
        ends = list(accumulate(sizes))
        with closing(self.residents.visit(layer, asked)) as visits:
            for visit in visits:
                e = visit.key[1]
                place = slice(ends[e] - sizes[e], ends[e])
                y[place] = run_loop(rows[place], counts[e : e + 1], self._ready(visit))
        return y

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Begin to read what a layer will likely ask for."""
        if self.trace is not None:
            self.trace.guessed(layer, experts)
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "offload")
        # What was computed with a slot's old weights is done before new ones are copied there.
        done = torch.cuda.current_stream(self._side.device).record_event() if self._side else None
        for key, slot in self.residents.prefetch(layer, experts):
            self._settle(slot)
            self._reading[slot] = self._reader.submit(self._read_ahead, key, slot, done)

    def _read_ahead(self, key: Key, slot: int, done: torch.cuda.Event | None) -> None:
        """In the thread: read an expert, on a stream of its own if it goes to a GPU."""
        if self._side is None or done is None:
            self._shelf.fetch(key, self._experts[slot])
            return
        with torch.cuda.stream(self._side):
            self._side.wait_event(done)
            self._shelf.fetch(key, self._experts[slot])
            self._side.synchronize()

    def _ready(self, visit: Visit) -> Experts:
        """The expert, once it is in its slot."""
        error = self._settle(visit.slot)
        if not visit.hit or error is not None:  # what could not be read ahead is tried again
            try:
                self._shelf.fetch(visit.key, self._experts[visit.slot])
            except BaseException:
                self.residents.drop(visit.key)
                raise
        return self._experts[visit.slot]

    def _settle(self, slot: int) -> BaseException | None:
        """Wait until nothing is being read to a slot; the error, if that failed."""
        reading = self._reading.pop(slot, None)
        return None if reading is None else reading.exception()


def _empty(like: Experts, device: torch.device | str, dtype: torch.dtype) -> Experts:
    """An `Experts` of one with memory of its own."""
    bias = like.down_bias is not None
    with torch.device("meta"):
        slot = Experts(1, like.d_model, like.d_ff, activation=like.activation, bias=bias)
    return slot.to(dtype).to_empty(device=device).requires_grad_(False)


class Store:
    """A dispatch whose experts come to their slots when they are asked for.

    The outputs are those of `sorted_rows` with all experts in memory, whatever the policy and the
    budget: bit for bit those of their backend "loop", to a rounding those of the others. There are
    no gradients: it is for inference.

    Args:
        experts: in host memory; or a `Pool`, whose slots several layers share.
        resident: bytes of the slots, at most; with a `Pool` it has its own.
        policy: which expert leaves when another needs its slot.

            | policy | who leaves |
            |---|---|
            | none | an expert that has done its work, at once |
            | lru | the least recently used |
            | lfu | the least frequently used, where old uses count less |
            | pinned | the most popular of a trace stay; the others share one slot |
        layer: number of the layer among those with experts, from 0.
        guess: of this layer's tokens makes the experts that the next layer will likely want, which
            are then read in the background; None: nothing is read ahead.
        device: of the slots; None: that of the experts.
        hot, decay, trace: as in `Pool`.

    Raises:
        ValueError: if an argument is impossible; in the call, if a gradient is wanted.

    Example:
        >>> experts, x = Experts(8, d_model=4, d_ff=6, backend="loop"), torch.randn(5, 4)
        >>> layer = MoELayer(TopKRouter(4, 8, k=2), experts)
        >>> store = Store(experts, resident=2000)
        >>> offloaded = MoELayer(layer.router, experts, dispatch=store)
        >>> with torch.no_grad():
        ...     torch.equal(offloaded(x)[0], layer(x)[0])
        True

    Source: caching and early routing: Eliseev and Mazur 2023 (2312.17238), sections 3.1 and 3.2.
    """

    def __init__(
        self,
        experts: Experts | Pool,
        *,
        resident: int | None = None,
        policy: str = "lru",
        layer: int = 0,
        guess: Guess | None = None,
        hot: Trace | None = None,
        decay: float = 0.99,
        trace: Trace | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(experts, Experts):
            check_sizes(resident=resident or 0)
            place = experts.down.device if device is None else device
            experts = Pool(
                Host([experts], place),
                experts,
                total=experts.n_experts,
                resident=resident or 0,
                policy=policy,
                hot=hot,
                decay=decay,
                trace=trace,
                device=place,
                dtype=experts.down.dtype,
            )
        self.pool, self.layer, self.guess = experts, layer, guess

    @property
    def stats(self) -> Stats:
        """Hits, misses and bytes so far, of all layers that share the slots."""
        return self.pool.stats

    def __call__(
        self, x: Float[Tensor, "tokens d_model"], routing: Routing, experts: object = None
    ) -> Float[Tensor, "tokens d_model"]:
        """The weighted sum of the experts' outputs; the third argument is not looked at."""
        y = sorted_rows(x, routing, self.run)
        if self.guess is not None:
            self.pool.prefetch(self.layer + 1, self.guess(x, routing.mask))
        return y

    def run(
        self, rows: Float[Tensor, "rows d_model"], counts: Int[Tensor, " n_experts"]
    ) -> Float[Tensor, "rows d_model"]:
        """Apply expert e to the next counts[e] rows, for every e in order."""
        return self.pool.run(self.layer, rows, counts)


class Fetched(nn.Module):
    """Stands where a layer's experts were, without weights; its call goes to a `Store`.

    Args:
        experts: whose place it takes.
        store: what fetches them.

    Example:
        >>> experts, rows = Experts(3, d_model=4, d_ff=8), torch.randn(2, 4)
        >>> counts = torch.tensor([0, 2, 0])
        >>> fetched = Fetched(experts, Store(experts, resident=2000))
        >>> with torch.no_grad():
        ...     torch.equal(fetched(rows, counts), experts(rows, counts))
        True
    """

    def __init__(self, experts: Experts, store: Store) -> None:
        super().__init__()
        self.n_experts, self.d_model, self.d_ff = experts.n_experts, experts.d_model, experts.d_ff
        self.activation, self.store = experts.activation, store

    def forward(
        self, rows: Float[Tensor, "rows d_model"], counts: Int[Tensor, " n_experts"]
    ) -> Float[Tensor, "rows d_model"]:
        return self.store.run(rows, counts)

    def _save_to_state_dict(self, *_: object) -> None:
        raise ValueError("the experts are in their files: load the model whole to save it")

    def extra_repr(self) -> str:
        sizes = f"n_experts={self.n_experts}, d_model={self.d_model}, d_ff={self.d_ff}"
        return f"{sizes}, activation={self.activation}"


def early(router: Callable[..., Routing], factor: Float[Tensor, " d_model"] | None = None) -> Guess:
    """A guess of what the next layer wants: its router, applied to this layer's tokens.

    Args:
        router: of the next layer.
        factor: of each feature, for tokens that were normed for this layer; None: 1.

    Returns:
        A function `(x, mask)` that lists the experts for which any token asks, by demand.

    Example:
        >>> router = TopKRouter(d_model=2, n_experts=3, k=1)
        >>> router.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> early(router)(torch.tensor([[0.0, 2.0]]), torch.tensor([True]))
        [1]
    """

    def guess(x: Float[Tensor, "tokens d_model"], mask: Bool[Tensor, " tokens"]) -> list[int]:
        with torch.no_grad():
            demand = router(x if factor is None else x * factor, mask=mask).demand.tolist()
        return sorted((e for e, n in enumerate(demand) if n), key=lambda e: (-demand[e], e))

    return guess
