"""Which block of a pool holds which tokens of which sequence: bookkeeping, without tensors.

    blocks.open("a", prompt)            # how many tokens are there already, of a prefix in common
    plan = blocks.plan({"a": 5})        # room for a step of 5 tokens; nothing has changed yet
    blocks.commit(plan)                 # the step is done, and counts
    blocks.append("a", [token])         # what comes next
    blocks.free("a")                    # ended, or preempted

Who holds a block that others hold too reads it, and never writes it: it gets a copy first.
"""

import hashlib
import operator
import reprlib
from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from ._validate import check_sizes


@dataclass
class _Sequence:
    tokens: list[int] | None  # None: they were never told
    table: list[int] = field(default_factory=list)  # position p stands in table[p // block]
    length: int = 0  # tokens stored
    chain: list[bytes] = field(default_factory=list)  # for each full block, the hash up to its end


@dataclass(frozen=True, eq=False)
class Plan:
    """A step that has room, and does not count yet.

    Attributes:
        ends: tokens that each sequence of the step will hold.
        tables: the blocks of each, in order.
        copies: pairs of blocks; the first must be copied into the second before the step writes.
        taken: blocks that go from free to used, targets of copies among them.

    Example:
        >>> Blocks(8, block=4).plan({})
        Plan(ends={}, tables={}, copies=[], taken=[])
    """

    ends: Mapping[Hashable, int]
    tables: Mapping[Hashable, list[int]]
    copies: list[tuple[int, int]]
    taken: list[int]


@dataclass(frozen=True)
class Usage:
    """How the blocks of a pool are used.

    Attributes:
        free: blocks of no use to anybody.
        cached: blocks that no sequence holds, full of tokens that one may begin with.
        used: blocks that one sequence holds, or several.
        held: the same, each as often as it is held: what they were without sharing.

    Example:
        >>> Blocks(8).usage
        Usage(free=8, cached=0, used=0, held=0)
    """

    free: int
    cached: int
    used: int
    held: int


class Blocks:
    """A pool of blocks of equal size, and who holds them.

    A full block is found again by the SHA-256 of its tokens and of all before them, so that no two
    texts are taken for one another. It can be found from the moment its step counts until its last
    holder writes into it, or until it has no holder and room is needed: then the block goes whose
    last holder left first.

    Only one step at a time is under way. Opening, forking, cutting or freeing any sequence gives
    the step up, as does the next plan; nothing has to be undone.

    Args:
        n_blocks: blocks in the pool.
        block: tokens in a block.

    Raises:
        ValueError: if a size is below 1; in every method, if a sequence is not open.

    Example:
        >>> blocks = Blocks(8, block=4)
        >>> for name in ("a", "b"):
        ...     found = blocks.open(name, [3, 1, 4, 1, 5, 9])
        ...     blocks.commit(blocks.plan({name: 6 - found}))
        >>> blocks.table("a"), blocks.table("b")
        ([0, 1], [0, 2])
        >>> blocks.usage
        Usage(free=5, cached=0, used=3, held=4)

    Source: blocks, copy on write: Kwon et al. 2023 (2309.06180), section 4; prefixes: Zheng et al.
    2023 (2312.07104), section 3.
    """

    def __init__(self, n_blocks: int, block: int = 16) -> None:
        check_sizes(n_blocks=n_blocks, block=block)
        self.n_blocks, self.block = n_blocks, block
        self._sequences: dict[Hashable, _Sequence] = {}
        self._holders = [0] * n_blocks
        self._free = list(range(n_blocks))[::-1]  # the last is taken first
        self._cached: dict[int, None] = {}  # by age, the oldest first
        self._found: dict[bytes, int] = {}  # a hash and the block that it is of
        self._hashes: dict[int, bytes] = {}  # the same, the other way round
        self._plan: Plan | None = None

    def __contains__(self, sequence: Hashable) -> bool:
        return sequence in self._sequences

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.n_blocks}, block={self.block}, {self.usage})"

    @property
    def usage(self) -> Usage:
        """Blocks by their state."""
        free, cached = len(self._free), len(self._cached)
        held = sum(len(sequence.table) for sequence in self._sequences.values())
        return Usage(free, cached, self.n_blocks - free - cached, held)

    def table(self, sequence: Hashable) -> list[int]:
        """The blocks of a sequence, in order."""
        return list(self._get(sequence).table)

    def length(self, sequence: Hashable) -> int:
        """Tokens of a sequence that are stored."""
        return self._get(sequence).length

    def open(self, sequence: Hashable, tokens: Iterable[int] | None = None) -> int:
        """Begin a sequence with what is there of its tokens already.

        Args:
            sequence: what to call it.
            tokens: its first tokens. None: they are never told, for this sequence; then it shares
                blocks with its forks only, and no plan checks how many tokens it has.

        Returns:
            How many of the tokens are stored: whole blocks, and never the last token, whose pass
            gives the first logits.
        """
        new = self._add(sequence, _Sequence(None if tokens is None else _ids(tokens)))
        for chunk in range(max(len(new.tokens or ()) - 1, 0) // self.block):
            link = self._link(new, chunk)
            if (block := self._found.get(link)) is None:
                break
            new.chain.append(link)
            new.table.append(block)
            self._cached.pop(block, None)
            self._holders[block] += 1
        new.length = len(new.table) * self.block
        return new.length

    def append(self, sequence: Hashable, tokens: Iterable[int]) -> None:
        """Tell the next tokens of a sequence, before the step that stores them."""
        known = self._get(sequence).tokens
        if known is None:
            raise ValueError(f"sequence {sequence!r} was opened without tokens")
        known.extend(_ids(tokens))

    def fork(self, sequence: Hashable, new: Hashable) -> None:
        """Open a second sequence with all that the first one holds."""
        old = self._get(sequence)
        tokens = None if old.tokens is None else list(old.tokens)
        self._add(new, _Sequence(tokens, list(old.table), old.length, list(old.chain)))
        for block in old.table:
            self._holders[block] += 1

    def truncate(self, sequence: Hashable, length: int) -> None:
        """Forget all tokens of a sequence from position `length` on, stored or only told."""
        cut = self._get(sequence)
        if not 0 <= length <= cut.length:
            raise ValueError(f"length={length} is not from 0 to the {cut.length} tokens stored")
        self._plan = None
        keep = self._blocks(length)
        self._release(cut.table[keep:])
        del cut.table[keep:], cut.chain[length // self.block :]
        if cut.tokens is not None:
            del cut.tokens[length:]
        cut.length = length

    def free(self, sequence: Hashable) -> None:
        """Close a sequence. What is full stays to be found, until room is needed."""
        self._release(self._get(sequence).table)
        self._plan = None
        del self._sequences[sequence]

    def blocks_needed(self, new: Mapping[Hashable, int]) -> int:
        """Blocks that a step takes which stores so many new tokens of each of these sequences."""
        held = ((self._get(sequence), n) for sequence, n in new.items())
        grown = sum(self._blocks(h.length + n) - len(h.table) for h, n in held)
        return grown + len(self._copied(new))

    def can_append(self, new: Mapping[Hashable, int]) -> bool:
        """Whether there is room for such a step."""
        return self.blocks_needed(new) <= len(self._free) + len(self._cached)

    def plan(self, new: Mapping[Hashable, int]) -> Plan:
        """Find room for a step.

        What happens in a pool before `commit` is that unused blocks are forgotten: those that the
        step will take, and tokens that it will overwrite after `truncate`.

        Args:
            new: for each sequence of the step, how many tokens it will store.

        Raises:
            ValueError: if a sequence has not so many tokens, or there are too few blocks; the pool
                is as before.
        """
        for sequence, n in new.items():
            held = self._get(sequence)
            left = n if held.tokens is None else len(held.tokens) - held.length
            if not 0 <= n <= left:
                told = f"sequence {sequence!r} has {left} tokens to store, not {n}"
                raise ValueError(f"{told}: append them before the step")
        needed, copied = self.blocks_needed(new), self._copied(new)
        if needed > len(self._free) + len(self._cached):
            raise ValueError(
                f"out of blocks: the step needs {needed}, and of n_blocks={self.n_blocks} there are"
                f" {len(self._free)} free and {len(self._cached)} cached; free a sequence first"
            )
        while len(self._free) < needed:
            oldest = next(iter(self._cached))
            self._forget(oldest)
            del self._cached[oldest]
            self._free.append(oldest)
        taken = self._free[len(self._free) - needed :][::-1]
        rest, ends, tables, copies = iter(taken), {}, {}, []
        for sequence, n in new.items():
            old = self._sequences[sequence]
            ends[sequence], table = old.length + n, list(old.table)
            if sequence in copied:
                copies.append((table[-1], next(rest)))
                table[-1] = copies[-1][1]
            elif n and old.length % self.block:
                self._forget(table[-1])
            table += [next(rest) for _ in range(self._blocks(ends[sequence]) - len(table))]
            tables[sequence] = table
        self._plan = Plan(ends, tables, copies, taken)
        return self._plan

    def check_current(self, plan: Plan) -> None:
        """Raise a ValueError if the step of this plan has been given up."""
        if plan is not self._plan:
            raise ValueError("the step was given up: since its plan the pool has changed")

    def commit(self, plan: Plan) -> None:
        """Count a step: its tokens are stored, and its full blocks can be found."""
        self.check_current(plan)
        self._plan = None
        del self._free[len(self._free) - len(plan.taken) :]
        for block in plan.taken:
            self._holders[block] = 1
        self._release([source for source, _ in plan.copies])
        for sequence, table in plan.tables.items():
            done = self._sequences[sequence]
            done.table, done.length = table, plan.ends[sequence]
            full = 0 if done.tokens is None else done.length // self.block
            for chunk in range(len(done.chain), full):
                done.chain.append(self._link(done, chunk))
                if done.chain[-1] not in self._found:
                    self._found[done.chain[-1]] = table[chunk]
                    self._hashes[table[chunk]] = done.chain[-1]

    def check(self) -> None:
        """Raise a RuntimeError that names a rule which the pool breaks. For tests: it is slow."""
        sequences, every = self._sequences, range(self.n_blocks)
        holders = Counter(block for held in sequences.values() for block in held.table)
        cached, states = {*self._cached}, [*self._free, *self._cached, *holders]
        rules = {
            "a block is free, cached or used": sorted(states) == list(every),
            "a block knows how many hold it": self._holders == [holders[block] for block in every],
            "a hash finds its block": self._found == {h: b for b, h in self._hashes.items()},
            "cached is what is found and not held": cached == {*self._hashes} - {*holders},
        }
        places: dict[int, list[tuple[int, list[int]]]] = {}
        for name, held in sequences.items():
            exact = len(held.table) == len({*held.table}) == self._blocks(held.length)
            rules[f"sequence {name!r} has the blocks of its tokens, each once"] = exact
            if held.tokens is None:
                continue
            links = [self._link(held, chunk) for chunk in range(held.length // self.block)]
            found = [self._hashes.get(*pair) for pair in zip(held.table, links)]
            rules[f"sequence {name!r} has the hashes of its tokens"] = held.chain == links == found
            for chunk, block in enumerate(held.table):
                text = held.tokens[: min(held.length, (chunk + 1) * self.block)]
                places.setdefault(block, []).append((chunk, text))
        for block, those in places.items():
            chunk, longest = max(those, key=lambda place: len(place[1]))
            same = all(place == (chunk, longest[: len(place[1])]) for place in those)
            rules[f"block {block} is of one place in one text"] = same
        for rule, kept in rules.items():
            if not kept:
                raise RuntimeError(f"the pool breaks the rule: {rule}")

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block)

    def _add(self, sequence: Hashable, new: _Sequence) -> _Sequence:
        if sequence in self._sequences:
            raise ValueError(f"sequence {sequence!r} is open already")
        self._plan, self._sequences[sequence] = None, new
        return new

    def _get(self, sequence: Hashable) -> _Sequence:
        if sequence not in self._sequences:
            raise ValueError(f"sequence {sequence!r} is not open")
        return self._sequences[sequence]

    def _copied(self, new: Mapping[Hashable, int]) -> set[Hashable]:
        """The sequences of a step that need a copy of their last block, as others hold it too."""
        writers: dict[int, list[Hashable]] = {}
        for sequence, n in new.items():
            held = self._get(sequence)
            if n and held.length % self.block:
                writers.setdefault(held.table[-1], []).append(sequence)
        for block, names in writers.items():
            if len(names) == self._holders[block]:  # if all go, the longest can stay: it writes
                names.remove(max(names, key=self.length))  # where no other has a token to lose
        return {name for names in writers.values() for name in names}

    def _release(self, blocks: list[int]) -> None:
        """Give blocks back, the last first: without those before it, a block is never found."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block] and block in self._hashes:
                self._cached[block] = None
            elif not self._holders[block]:
                self._free.append(block)

    def _forget(self, block: int) -> None:
        """Let a block not be found any more."""
        self._found.pop(self._hashes.pop(block, b""), None)

    def _link(self, held: _Sequence, chunk: int) -> bytes:
        """The hash of all tokens up to the end of a block, from that of the block before it."""
        assert held.tokens is not None
        own = held.tokens[chunk * self.block : (chunk + 1) * self.block]
        before = held.chain[chunk - 1] if chunk else b""
        return hashlib.sha256(before + array("q", own).tobytes()).digest()


def _ids(tokens: Iterable[int]) -> list[int]:
    try:
        return [operator.index(token) for token in tokens]
    except TypeError:
        raise ValueError(f"tokens={reprlib.repr(tokens)} are no whole numbers") from None
