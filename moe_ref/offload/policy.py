"""Which experts are in memory, and which leaves when another comes: bookkeeping without tensors.

The store that runs a model and the simulator that replays a trace hold the same `Residents`, so
their hit rates are the same number, not two estimates of it.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from .._validate import Named, check_choice, check_sizes

Key = tuple[int, int]  # a MoE layer, counted from 0, and one of its experts


@dataclass
class Stats:
    """How often an expert that was asked for was there, and what was read.

    Attributes:
        hits: experts that had a slot when a layer asked for them, guessed ones among them.
        misses: experts that were read when asked for.
        prefetched: experts that were read ahead, on a guess.
        used: of these, those that were asked for before they left.
        read_bytes: of one expert, as it is stored.

    Example:
        >>> Stats(hits=6, misses=2, read_bytes=100).hit_rate
        0.75
    """

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    used: int = 0
    read_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were there; 0 if none was asked for."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def bytes_read(self) -> int:
        """Bytes of all experts that were read, when asked for or ahead."""
        return (self.misses + self.prefetched) * self.read_bytes


class Policy:
    """Which expert leaves; this one keeps none: an expert leaves as soon as it has done its work.

    Args:
        slots: experts that fit.
        hot: the most popular experts of a trace, most popular first.
        decay: what a use counts after each later call of a layer, as a factor.

    Example:
        >>> [name for name, policy in POLICIES.items() if policy.keeps]
        ['lru', 'lfu', 'pinned']
    """

    keeps = False

    def __init__(self, slots: int, hot: Sequence[Key], decay: float) -> None:
        self.now = 0  # calls of a layer so far

    def used(self, key: Key) -> None:
        """An expert was asked for."""

    def value(self, key: Key) -> float:
        """The expert of least value leaves first; ties: that of the lower layer and number."""
        return 0.0

    def may_leave(self, key: Key) -> bool:
        """Whether this expert may leave at all."""
        return True


class LRU(Policy):
    """The expert that was asked for least recently leaves.

    Example:
        >>> residents = Residents(slots=2, policy="lru")
        >>> [[visit.hit for visit in residents.visit(0, [e])][0] for e in (7, 8, 7, 9, 7, 8)]
        [False, False, True, False, True, False]
    """

    keeps = True

    def __init__(self, slots: int, hot: Sequence[Key], decay: float) -> None:
        super().__init__(slots, hot, decay)
        self._last: dict[Key, int] = {}

    def used(self, key: Key) -> None:
        self._last[key] = self.now

    def value(self, key: Key) -> float:
        return self._last.get(key, 0)


class LFU(Policy):
    """The expert that was asked for least often leaves; old uses count less.

    Example:
        >>> residents = Residents(slots=2, policy="lfu")
        >>> [[visit.hit for visit in residents.visit(0, [e])][0] for e in (7, 7, 8, 9, 7, 8)]
        [False, True, False, False, True, False]
    """

    keeps = True

    def __init__(self, slots: int, hot: Sequence[Key], decay: float) -> None:
        super().__init__(slots, hot, decay)
        self._decay, self._uses = decay, dict[Key, tuple[float, int]]()

    def used(self, key: Key) -> None:
        self._uses[key] = (self.value(key) + 1, self.now)

    def value(self, key: Key) -> float:
        uses, last = self._uses.get(key, (0.0, self.now))
        return uses * self._decay ** (self.now - last)


class Pinned(LRU):
    """The most popular experts of a trace stay once they are there; the others share one slot.

    Example:
        >>> residents = Residents(slots=2, policy="pinned", hot=[(0, 7)])
        >>> [[visit.hit for visit in residents.visit(0, [e])][0] for e in (7, 8, 9, 7, 9, 8)]
        [False, False, False, True, True, False]
    """

    def __init__(self, slots: int, hot: Sequence[Key], decay: float) -> None:
        super().__init__(slots, hot, decay)
        self._pinned = frozenset(hot[: slots - 1])

    def may_leave(self, key: Key) -> bool:
        return key not in self._pinned


POLICIES = Named("policy", {"none": Policy, "lru": LRU, "lfu": LFU, "pinned": Pinned})


@dataclass(frozen=True)
class Visit:
    """An expert at work: which it is, the slot it has, and whether it was there before.

    Example:
        >>> next(Residents(slots=2).visit(layer=0, experts=[5]))
        Visit(key=(0, 5), slot=0, hit=False)
    """

    key: Key
    slot: int
    hit: bool


class Residents:
    """Which expert has which slot.

    Args:
        slots: how many experts fit.
        policy: a name of `POLICIES`.
        hot: for "pinned": the experts to keep, most popular first.
        decay: for "lfu": what a use counts after each later call of a layer, as a factor.

    Raises:
        ValueError: if an argument is impossible.

    Example:
        >>> residents = Residents(slots=2)
        >>> for experts in ([1, 2], [2, 3], [2, 3]):
        ...     print([(visit.key[1], visit.hit) for visit in residents.visit(0, experts)])
        [(1, False), (2, False)]
        [(2, True), (3, False)]
        [(2, True), (3, True)]
    """

    def __init__(
        self, slots: int, policy: str = "lru", *, hot: Sequence[Key] = (), decay: float = 0.99
    ) -> None:
        check_sizes(slots=slots)
        check_choice("policy", policy, POLICIES)
        if policy == "pinned" and not hot:
            raise ValueError("policy='pinned' needs hot, a trace of which experts are popular")
        if not 0 < decay <= 1:
            raise ValueError(f"decay={decay} is not more than 0 and at most 1")
        self.slots, self.stats = slots, Stats()
        self.policy = POLICIES[policy](slots, hot, decay)
        self._slot_of: dict[Key, int] = {}
        self._free = list(reversed(range(slots)))
        self._ahead: set[Key] = set()  # read on a guess, and not asked for yet

    def __contains__(self, key: Key) -> bool:
        return key in self._slot_of

    def visit(self, layer: int, experts: Sequence[int]) -> Generator[Visit, None, None]:
        """One layer's experts, one after the other, each with a slot while it works.

        Those that are there go first: else they might leave before their turn. What an expert
        computes does not depend on the order.
        """
        self.policy.now += 1
        keys = [(layer, expert) for expert in experts]
        for key in sorted(keys, key=lambda key: key not in self):
            hit = key in self
            if hit:
                self.stats.hits += 1
                self.stats.used += key in self._ahead
            else:
                self.stats.misses += 1
                self._admit(key, keep=set())
            self._ahead.discard(key)
            self.policy.used(key)
            try:
                yield Visit(key, self._slot_of[key], hit)
            finally:
                if not self.policy.keeps:
                    self.drop(key)
        if not self.policy.keeps:  # wrong guesses go too
            for key in [key for key in self._ahead if key[0] == layer]:
                self.drop(key)

    def prefetch(self, layer: int, experts: Sequence[int]) -> list[tuple[Key, int]]:
        """Give slots to experts that a layer will likely ask for; those to be read are returned."""
        keys = [(layer, expert) for expert in experts][: self.slots]
        given = []
        for key in keys:
            if key not in self and self._admit(key, keep=set(keys)):
                self._ahead.add(key)
                self.stats.prefetched += 1
                given.append((key, self._slot_of[key]))
        return given

    def drop(self, key: Key) -> None:
        """Take an expert's slot away, if it has one: it left, or could not be read."""
        self._ahead.discard(key)
        if key in self._slot_of:
            self._free.append(self._slot_of.pop(key))

    def _admit(self, key: Key, keep: set[Key]) -> bool:
        """Give an expert a slot, another's if need be; False if nobody may leave."""
        if not self._free:
            leaving = [k for k in self._slot_of if k not in keep and self.policy.may_leave(k)]
            if not leaving:
                return False
            # A guess that is still unused was wrong: what is asked for is visited first.
            self.drop(min(leaving, key=lambda k: (k not in self._ahead, self.policy.value(k), k)))
        self._slot_of[key] = self._free.pop()
        return True
