"""Blocks: no token of a sequence is ever lost, whatever others do; what is shared, kept, refused.

The truth is a memory by itself: in each place stands the whole text up to there. It is written and
read as a plan says, and then each sequence must read its own text.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moe_ref.blocks import Blocks, Usage

# Texts that often begin alike, and part at any place.
TEXTS = st.tuples(st.sampled_from([[0] * 12, [0] * 5 + [1] * 7]), st.integers(0, 12)).map(
    lambda drawn: drawn[0][: drawn[1]]
)


def stored(pool, texts, place, new):
    """A step in a memory of one's own: `place` holds a text in each place; the plan comes back."""
    plan = pool.plan(new)
    for source, target in plan.copies:
        for i in range(pool.block):
            place[target, i] = place.get((source, i))
    for sequence, n in new.items():
        end = plan.ends[sequence]
        for at in range(end - n, end):
            block = plan.tables[sequence][at // pool.block]
            place[block, at % pool.block] = tuple(texts[sequence][: at + 1])
    return plan


class Machine(RuleBasedStateMachine):
    """Sequences in a small pool. `texts`: all tokens told; `lengths`: how many are stored."""

    def __init__(self):
        super().__init__()
        self.pool, self.place = Blocks(9, block=3), {}
        self.texts, self.lengths, self.count = {}, {}, 0

    def name(self):
        self.count += 1
        return self.count

    @precondition(lambda self: len(self.texts) < 5)
    @rule(text=TEXTS, at_once=st.booleans())
    def open(self, text, at_once):
        name = self.name()
        found = self.pool.open(name, text)
        assert found % 3 == 0 and (found < len(text) or not found)
        self.texts[name], self.lengths[name] = list(text), found
        if at_once:
            self.take({name: len(text) - found}, breaks=False)

    @precondition(lambda self: 0 < len(self.texts) < 5)
    @rule(data=st.data(), goes_on=st.sampled_from(["none", "old", "new", "both"]))
    def fork(self, data, goes_on):
        old, new = data.draw(st.sampled_from([*self.texts])), self.name()
        self.pool.fork(old, new)
        self.texts[new], self.lengths[new] = list(self.texts[old]), self.lengths[old]
        names = {"none": [], "old": [old], "new": [new], "both": [old, new]}[goes_on]
        for name in names:
            self.pool.append(name, [name])
            self.texts[name].append(name)
        self.take({n: len(self.texts[n]) - self.lengths[n] for n in names}, breaks=False)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def free(self, data):
        name = data.draw(st.sampled_from([*self.texts]))
        self.pool.free(name)
        del self.texts[name], self.lengths[name]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def preempt_and_come_back(self, data):
        name = data.draw(st.sampled_from([*self.texts]))
        self.pool.free(name)
        self.lengths[name] = self.pool.open(name, self.texts[name])

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def truncate(self, data):
        name = data.draw(st.sampled_from([*self.texts]))
        length = data.draw(st.integers(0, self.lengths[name]))
        self.pool.truncate(name, length)
        del self.texts[name][length:]
        self.lengths[name] = length

    @precondition(lambda self: self.texts)
    @rule(
        data=st.data(),
        added=st.lists(st.lists(st.integers(0, 1), max_size=3), min_size=5, max_size=5),
        waits=st.sampled_from([0, 0, 0, 1, 3]),
        breaks=st.sampled_from([False, False, True]),
    )
    def step(self, data, added, waits, breaks):
        names = data.draw(st.lists(st.sampled_from([*self.texts]), unique=True, min_size=1))
        new = {}
        for name, tokens in zip(names, added):
            self.pool.append(name, tokens)
            self.texts[name] += tokens
            new[name] = max(len(self.texts[name]) - self.lengths[name] - waits, 0)
        self.take(new, breaks)

    def take(self, new, breaks):
        before, needed = self.pool.usage, self.pool.blocks_needed(new)
        room = before.free + before.cached
        assert self.pool.can_append(new) == (needed <= room)
        if needed > room:
            with pytest.raises(ValueError, match="out of blocks"):
                self.pool.plan(new)
            assert self.pool.usage == before
            return
        plan = stored(self.pool, self.texts, self.place, new)
        assert len(plan.taken) == needed
        tables = {
            name: plan.tables[name][self.lengths[name] // 3 :] for name, n in new.items() if n
        }
        written = [block for table in tables.values() for block in table]
        assert len(written) == len(set(written)), "a block with two writers"
        assert self.pool.usage.used == before.used
        if not breaks:
            self.pool.commit(plan)
            for name, n in new.items():
                self.lengths[name] += n

    @invariant()
    def every_sequence_reads_its_own_text(self):
        self.pool.check()
        for name, text in self.texts.items():
            assert self.pool.length(name) == self.lengths[name]
            for at in range(self.lengths[name]):
                block = self.pool.table(name)[at // 3]
                assert self.place[block, at % 3] == tuple(text[: at + 1])

    @invariant()
    def nothing_is_lost(self):
        usage = self.pool.usage
        assert usage.free + usage.cached + usage.used == 9
        assert usage.held == sum(-(-length // 3) for length in self.lengths.values())
        if not self.texts:
            assert usage.used == 0


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def store(pool, sequence, tokens):
    """Open a sequence and store all its tokens; how many were found."""
    found = pool.open(sequence, tokens)
    pool.commit(pool.plan({sequence: len(tokens) - found}))
    return found


# ------------------------------------------------------------------------------ prefixes


def test_a_prefix_is_found_by_whole_blocks_and_never_up_to_the_last_token():
    pool = Blocks(20, block=4)
    text = list(range(10))
    assert store(pool, "a", text) == 0
    assert [store(pool, n, text[:n]) for n in (3, 4, 5, 8, 9)] == [0, 0, 4, 4, 8]
    assert pool.open("b", [*text[:4], 99, *text[5:]]) == 4
    assert pool.open("c", text[4:]) == 0  # the same tokens elsewhere are another text


def test_a_block_is_found_only_when_its_step_counts():
    pool = Blocks(20, block=4)
    text = list(range(9))
    pool.open("a", text)
    pool.plan({"a": 9})
    assert pool.open("b", text) == 0
    pool.commit(pool.plan({"a": 9}))
    assert pool.open("c", text) == 8


def test_a_block_that_is_overwritten_is_found_no_more():
    pool = Blocks(20, block=4)
    text = list(range(9))
    store(pool, "a", text)
    pool.truncate("a", 6)
    assert pool.open("b", text) == 8  # still as it was
    pool.free("b")
    pool.append("a", [77])
    pool.plan({"a": 1})  # may write at once, and break later
    assert pool.open("c", text) == 4


def test_texts_with_one_hash_in_python_are_two_texts():
    pool = Blocks(20, block=2)
    assert hash((-1, 5)) == hash((-2, 5))
    store(pool, "a", [-1, 5, 0])
    assert pool.open("b", [-2, 5, 0]) == 0


def test_the_hash_of_a_block_is_that_of_all_tokens_before_it():
    """Without what came before, the second blocks of these two texts would be one."""
    pool = Blocks(20, block=2)
    store(pool, "a", [1, 2, 3, 4, 0])
    store(pool, "b", [5, 6, 0])
    assert pool.open("c", [5, 6, 3, 4, 0]) == 2


def test_what_was_freed_is_found_until_room_is_needed_and_the_oldest_goes_first():
    pool = Blocks(6, block=2)
    for name, first in (("old", 10), ("new", 20)):
        store(pool, name, [first, 1, 2, 3, 4])  # two full blocks, and one that is not
    assert pool.usage == Usage(free=0, cached=0, used=6, held=6)
    pool.free("old"), pool.free("new")
    assert pool.usage == Usage(free=2, cached=4, used=0, held=0)
    store(pool, "more", [30, 1, 2, 3, 4])  # one too many for what is free
    assert pool.usage.cached == 3
    assert pool.open("again", [10, 1, 2, 3, 4]) == 2  # the last block of a text goes first
    assert pool.open("other", [20, 1, 2, 3, 4]) == 4


def test_a_prefix_that_was_used_again_is_young_again():
    pool = Blocks(3, block=2)
    for first in (10, 20):
        store(pool, first, [first, 1])
        pool.free(first)
    pool.open("hit", [10, 1, 2]), pool.free("hit")
    store(pool, "more", [30, 1, 2])
    assert [pool.open(f"{first} again", [first, 1, 2]) for first in (10, 20)] == [2, 0]


def test_a_sequence_of_untold_tokens_is_shared_by_forks_alone():
    pool = Blocks(9, block=2)
    for name in ("a", "b"):
        pool.open(name)
        pool.commit(pool.plan({name: 4}))
    pool.fork("a", "c")
    assert pool.usage == Usage(free=5, cached=0, used=4, held=6)
    for name in ("a", "b", "c"):
        pool.free(name)
    assert pool.usage == Usage(free=9, cached=0, used=0, held=0)


# ------------------------------------------------------------------------------ writing


def test_of_forks_that_go_on_together_each_but_the_longest_gets_a_copy():
    pool = Blocks(4, block=4)
    store(pool, "a", [1, 2, 3])
    pool.fork("a", "b"), pool.fork("a", "c")
    pool.truncate("b", 2), pool.truncate("a", 1)
    for name in ("a", "b", "c"):
        pool.append(name, [9])
    plan = pool.plan({"a": 1, "b": 1})  # c stays behind, and keeps the block
    assert plan.copies == [(0, 1), (0, 2)]
    plan = pool.plan({"a": 1, "b": 1, "c": 1})
    assert plan.copies == [(0, 1), (0, 2)] and plan.tables["c"] == [0]
    pool.commit(plan)
    assert pool.plan({}).taken == [] and pool.usage.used == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda pool: pool.open("b", [1]),
        lambda pool: pool.fork("a", "c"),
        lambda pool: pool.truncate("a", 0),
        lambda pool: pool.free("a"),
        lambda pool: pool.plan({"a": 3}),
    ],
)
def test_a_step_that_was_given_up_never_counts(change):
    pool = Blocks(8, block=4)
    pool.open("a", [1, 2, 3])
    plan = pool.plan({"a": 3})
    change(pool)
    with pytest.raises(ValueError, match="the step was given up"):
        pool.commit(plan)
    pool.check()
    assert pool.usage.used == 0


def test_a_plan_counts_once():
    pool = Blocks(8, block=4)
    pool.open("a", [1, 2, 3])
    plan = pool.plan({"a": 3})
    pool.commit(plan)
    with pytest.raises(ValueError, match="given up"):
        pool.commit(plan)


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pool: Blocks(0), "n_blocks=0 must be at least 1"),
        (lambda pool: Blocks(4, block=0), "block=0 must be at least 1"),
        (lambda pool: pool.open("a", [1]), "sequence 'a' is open already"),
        (lambda pool: pool.fork("a", "a"), "sequence 'a' is open already"),
        (lambda pool: pool.fork("x", "b"), "sequence 'x' is not open"),
        (lambda pool: pool.free("x"), "sequence 'x' is not open"),
        (lambda pool: pool.table("x"), "sequence 'x' is not open"),
        (lambda pool: pool.plan({"x": 1}), "sequence 'x' is not open"),
        (lambda pool: pool.can_append({"x": 1}), "sequence 'x' is not open"),
        (lambda pool: pool.truncate("a", 6), "length=6 is not from 0 to the 5 tokens stored"),
        (lambda pool: pool.truncate("a", -1), "length=-1 is not from 0 to the 5"),
        (lambda pool: pool.append("silent", [1]), "'silent' was opened without tokens"),
        (lambda pool: pool.append("a", [1.5]), r"tokens=\[1.5\] are no whole numbers"),
        (lambda pool: pool.open("b", "text"), "tokens='text' are no whole numbers"),
        (lambda pool: pool.open("b", 3), "tokens=3 are no whole numbers"),
        (lambda pool: pool.plan({"a": 1}), "'a' has 0 tokens to store, not 1: append them before"),
        (lambda pool: pool.plan({"a": -1}), "'a' has 0 tokens to store, not -1"),
        (
            lambda pool: pool.plan({"silent": 9}),
            "out of blocks: the step needs 3, and of n_blocks=4 there are 2 free and 0 cached",
        ),
    ],
)
def test_bad_input_is_answered_by_name_and_changes_nothing(call, message):
    pool = Blocks(4, block=4)
    store(pool, "a", [1, 2, 3, 4, 5])
    pool.open("silent")
    before = pool.usage
    with pytest.raises(ValueError, match=message):
        call(pool)
    pool.check()
    assert pool.usage == before and pool.table("a") == [0, 1] and pool.length("a") == 5
    assert "b" not in pool
    pool.commit(pool.plan({"silent": 8}))


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda pool: pool._free.pop(), "a block is free, cached or used"),
        (lambda pool: pool._free.append(0), "a block is free, cached or used"),
        (lambda pool: pool._holders.__setitem__(0, 2), "how many hold it"),
        (lambda pool: pool._found.clear(), "a hash finds its block"),
        (lambda pool: pool._hashes.__setitem__(3, b""), "a hash finds its block"),
        (lambda pool: pool._sequences["a"].tokens.__setitem__(0, 7), "'a' has the hashes"),
        (lambda pool: setattr(pool._sequences["a"], "length", 9), "'a' has the blocks"),
        (
            lambda pool: pool._sequences["b"].tokens.__setitem__(4, 7),
            "block 1 is of one place in one",
        ),
        (lambda pool: pool._sequences["c"].table.reverse(), "is of one place in one text"),
    ],
)
def test_the_check_names_what_is_broken(breakage, message):
    pool = Blocks(6, block=4)
    store(pool, "a", [1, 2, 3, 4, 5])
    pool.fork("a", "b"), pool.fork("a", "c")
    pool.check()
    breakage(pool)
    with pytest.raises(RuntimeError, match=message):
        pool.check()


def test_a_pool_prints_its_size_and_use():
    assert repr(Blocks(4)) == "Blocks(4, block=16, Usage(free=4, cached=0, used=0, held=0))"
