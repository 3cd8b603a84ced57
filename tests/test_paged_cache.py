"""The paged cache: the logits of the contiguous one, to the bit, whatever happened in the pool."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moe_ref import cost
from moe_ref.kv_cache import ContiguousCache, KVCache
from moe_ref.paged_cache import PagedBatch, PagedCache

from .test_attention import CONFIGS, MOE, build, tokens
from .test_blocks import TEXTS
from .tools import assert_close

# Products of one query with its keys round by whether these begin at a multiple of 16 bytes. With
# features of 16 bytes they always do; else with blocks of 4 tokens, and with stretches of ROOM.
BLOCK, ROOM = 4, 100


def make_pool(config=MOE, n_blocks=9, block=BLOCK, **options):
    a_block = 2 * config.n_layers * config.kv_heads * config.head_features * block * 4
    return PagedCache(config, memory=n_blocks * a_block, block=block, **options)


def held(pool, sequence):
    """Keys and values of a sequence, position by position: [n_layers, 2, kv_heads, length, f]."""
    config, table = pool.config, pool.table(sequence)
    store = pool.store.view(config.n_layers, 2, config.kv_heads, pool.n_blocks, pool.block, -1)
    length = range(pool.length(sequence))
    places = [store[:, :, :, table[at // pool.block], at % pool.block] for at in length]
    shape = (config.n_layers, 2, config.kv_heads, 0, config.head_features)
    return torch.stack(places, dim=3) if places else torch.zeros(shape)


def contiguous(pool, sequences):
    """A `ContiguousCache` that holds what these sequences hold."""
    cache = ContiguousCache(pool.config, len(sequences), ROOM)
    for row, sequence in enumerate(sequences):
        stored = held(pool, sequence)
        cache.lengths[row] = stored.shape[3]
        cache.keys[:, row, :, : stored.shape[3]] = stored[:, 0]
        cache.values[:, row, :, : stored.shape[3]] = stored[:, 1]
    return cache


def power_cut(*_):
    raise RuntimeError("power cut")


class Machine(RuleBasedStateMachine):
    """Sequences of a small pool. `texts`: all tokens told; `copies`: the keys and values of each,
    kept apart; of a prefix that was found, they are read once, and its logits compared."""

    def __init__(self):
        super().__init__()
        self.texts, self.copies, self.count = {}, {}, 0

    @initialize(config=st.sampled_from([*CONFIGS.values()]))
    def begin(self, config):
        self.model, self.pool = build(config), make_pool(config)

    def opened(self, name, text):
        found = self.pool.open(name, text)
        self.texts[name], self.copies[name] = list(text), held(self.pool, name)
        assert self.copies[name].shape[3] == found

    def draw(self, data):
        return data.draw(st.sampled_from([*self.texts]))

    @precondition(lambda self: len(self.texts) < 4)
    @rule(text=TEXTS, at_once=st.booleans())
    def open(self, text, at_once):
        self.count += 1
        self.opened(self.count, text)
        if at_once:
            self.take({self.count: len(text) - self.pool.length(self.count)}, False, False)

    @precondition(lambda self: 0 < len(self.texts) < 4)
    @rule(data=st.data(), goes_on=st.sampled_from(["none", "old", "new", "both"]))
    def fork(self, data, goes_on):
        old, self.count = self.draw(data), self.count + 1
        new = self.count
        self.pool.fork(old, new)
        self.texts[new], self.copies[new] = list(self.texts[old]), self.copies[old].clone()
        names = {"none": [], "old": [old], "new": [new], "both": [old, new]}[goes_on]
        for name in names:
            self.pool.append(name, [name % 50])
            self.texts[name].append(name % 50)
        if names:
            waiting = {name: len(self.texts[name]) - self.pool.length(name) for name in names}
            self.take(waiting, breaks=False, left=False)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), comes_back=st.booleans())
    def free_or_preempt(self, data, comes_back):
        name = self.draw(data)
        self.pool.free(name)
        text = self.texts.pop(name)
        del self.copies[name]
        if comes_back:
            self.opened(name, text)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), by_lengths=st.booleans())
    def truncate(self, data, by_lengths):
        name = self.draw(data)
        length = data.draw(st.integers(0, self.pool.length(name)))
        if by_lengths:
            batch = self.pool.batch([name])
            batch.lengths[0] = length
            batch.begin(0, None), batch.commit()
        else:
            self.pool.truncate(name, length)
        if length < len(self.copies[name][0, 0, 0]) or not by_lengths:
            del self.texts[name][length:]
            self.copies[name] = self.copies[name][:, :, :, :length]

    @precondition(lambda self: self.texts)
    @rule(
        data=st.data(),
        added=st.lists(st.lists(st.integers(0, 1), max_size=3), min_size=4, max_size=4),
        breaks=st.sampled_from([False, False, False, True]),
        left=st.booleans(),
    )
    def step(self, data, added, breaks, left):
        names = data.draw(st.lists(st.sampled_from([*self.texts]), unique=True, min_size=1))
        new = {}
        for name, more in zip(names, added):
            self.pool.append(name, more)
            self.texts[name] += more
            new[name] = len(self.texts[name]) - self.pool.length(name)
        self.take(new, breaks, left)

    @torch.no_grad()
    def take(self, new, breaks, left):
        names = [*new]
        seq = max(1, *new.values())
        batch, mask = torch.zeros(len(names), seq, dtype=torch.long), torch.zeros(len(names), seq)
        mask = mask.bool()
        for row, (name, n) in enumerate(new.items()):
            own = slice(seq - n, seq) if left else slice(n)
            at = self.pool.length(name)
            mask[row, own] = True
            batch[row, own] = torch.tensor(self.texts[name][at : at + n], dtype=torch.long)
        view = self.pool.batch(names)
        if not self.pool.can_append(new):
            with pytest.raises(ValueError, match="out of blocks"):
                self.model(batch, mask=mask, cache=view)
            return
        if breaks:
            hook = self.model.blocks[1].attention.register_forward_hook(power_cut)
            with pytest.raises(RuntimeError, match="power cut"):
                self.model(batch, mask=mask, cache=view)
            return hook.remove()
        mirror = contiguous(self.pool, names)
        ours = self.model(batch, mask=mask, cache=view).logits
        theirs = self.model(batch, mask=mask, cache=mirror).logits
        assert torch.equal(ours[mask], theirs[mask])
        assert torch.equal(view.lengths, mirror.lengths)
        for row, (name, n) in enumerate(new.items()):
            end = self.pool.length(name)
            kept = torch.stack([mirror.keys[:, row, :, :end], mirror.values[:, row, :, :end]], 1)
            self.copies[name] = kept.clone()
            if n:
                alone = self.model(torch.tensor([self.texts[name][:end]])).logits[0, -n:]
                assert_close(ours[row, mask[row]], alone)

    @invariant()
    def nothing_has_changed_but_by_a_step_of_its_own(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        for name, copy in self.copies.items():
            assert torch.equal(held(self.pool, name), copy)
        if not self.texts:
            assert self.pool.usage.used == 0


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@given(
    st.sampled_from([*CONFIGS.values()]),
    st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(0, 99),
)
@torch.no_grad()
def test_logits_are_those_of_the_contiguous_cache_to_the_bit(config, steps, block, seed):
    model, pool = build(config, seed), make_pool(config, 40, block)
    pool.open("a"), pool.open("b")
    paged, whole = pool.batch(["a", "b"]), ContiguousCache(config, 2, ROOM)
    assert isinstance(paged, KVCache)
    for step, new in enumerate(steps):
        seq = max(1, *new)
        mask = torch.arange(seq)[None] < torch.tensor(new)[:, None]
        step = tokens(2, seq, seed + step)
        ours, theirs = (model(step, mask=mask, cache=cache).logits for cache in (paged, whole))
        assert_close(ours[mask], theirs[mask], floor=1.0)
        if block == BLOCK or config.head_features % 4 == 0:
            assert torch.equal(ours[mask], theirs[mask])
    assert torch.equal(paged.lengths, whole.lengths)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_prefill_and_decode_of_one_length_need_no_mask_and_are_the_same_bits(config, mode):
    model, pool = build(config), make_pool(config)
    for name in "abc":
        pool.open(name)
    paged, whole = pool.batch("abc"), ContiguousCache(config, 3, ROOM)
    with mode():
        for step in (tokens(3, 5), tokens(3, 1), tokens(3, 1, 1), tokens(3, 4)):
            ours, theirs = (model(step, cache=cache).logits for cache in (paged, whole))
            assert torch.equal(ours, theirs)


# ------------------------------------------------------------------------------ sharing


@torch.no_grad()
def test_a_prefix_that_is_there_is_not_computed_again():
    model, pool = build(), make_pool()
    text = tokens(1, 11)
    pool.open("a", text[0].tolist())
    whole = model(text, cache=pool.batch(["a"])).logits
    pool.free("a")
    assert pool.open("b", text[0].tolist()) == 8
    assert_close(model(text[:, 8:], cache=pool.batch(["b"])).logits, whole[:, 8:])
    assert pool.usage.used == 3 and pool.usage.cached == 0


@torch.no_grad()
def test_keys_of_a_step_that_broke_are_found_by_nobody():
    model, pool = build(), make_pool()
    text = tokens(1, 11)
    hook = model.blocks[1].attention.register_forward_hook(power_cut)
    pool.open("a", text[0].tolist())
    before = pool.usage
    with pytest.raises(RuntimeError, match="power cut"):
        model(text, cache=pool.batch(["a"]))
    hook.remove()
    assert pool.usage == before
    assert pool.open("b", text[0].tolist()) == 0
    assert_close(model(text, cache=pool.batch(["b"])).logits, model(text).logits)


@torch.no_grad()
def test_a_fork_goes_its_own_way_and_leaves_the_other_as_it_is():
    model, pool = build(), make_pool()
    text = tokens(1, 5)
    pool.open("a", text[0].tolist())
    model(text, cache=pool.batch(["a"]))
    pool.fork("a", "b")
    before = held(pool, "a")
    for name, token in (("b", 7), ("a", 9)):
        pool.append(name, [token])
        ours = model(torch.tensor([[token]]), cache=pool.batch([name])).logits[0, -1]
        longer = torch.cat([text, torch.tensor([[token]])], dim=1)
        assert_close(ours, model(longer).logits[0, -1])
    assert torch.equal(held(pool, "a")[:, :, :, :5], before)
    assert pool.table("a")[0] == pool.table("b")[0] and pool.table("a")[1] != pool.table("b")[1]


@torch.no_grad()
def test_what_a_sequence_of_nan_left_behind_reaches_no_other():
    """A value that is not seen has weight 0, and 0 * NaN is NaN."""
    model, pool = build(), make_pool(n_blocks=4)
    text = tokens(2, 3)  # not a whole block
    pool.open("ill")
    broken = pool.batch(["ill"])
    broken.begin(12, None)
    for layer in range(2):
        broken.extend(layer, *torch.full((2, 1, 2, 12, 4), torch.nan))
    broken.commit()
    pool.truncate("ill", 6)
    pool.open("well")
    batch = pool.batch(["ill", "well"])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    ours = model(text, mask=mask, cache=batch).logits
    assert_close(ours[1], model(text[1:]).logits[0])
    assert ours[0, 0].isnan().all()


# ------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize(("config", "dtype"), [(MOE, torch.float32), (MOE, torch.bfloat16)])
def test_the_budget_is_kept_to_the_byte(config, dtype):
    a_block = 2 * 2 * 2 * 4 * BLOCK * dtype.itemsize  # keys and values, layers, heads, features
    for memory, n_blocks in ((a_block, 1), (3 * a_block - 1, 2), (3 * a_block, 3)):
        pool = PagedCache(config, memory=memory, block=BLOCK, dtype=dtype)
        assert pool.n_blocks == n_blocks and pool.block_bytes == a_block
        assert pool.store.untyped_storage().nbytes() == n_blocks * a_block
    with pytest.raises(ValueError, match=f"less than one block of block=4 tokens, {a_block} bytes"):
        PagedCache(config, memory=a_block - 1, block=BLOCK, dtype=dtype)


@given(st.lists(st.integers(7, 12), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 6))
def test_cost_predicts_what_the_pool_uses_to_the_byte(lengths, block, shared):
    pool = make_pool(n_blocks=60, block=block)
    for row, length in enumerate(lengths):
        text = [1] * shared + [row + 2] * (length - shared)
        found = pool.open(row, text)
        pool.commit(pool.plan({row: length - found}))
    predicted = cost.cache_bytes(MOE, lengths, block=block, shared=shared, dtype="float32")
    assert predicted.shared == pool.usage.used * pool.block_bytes
    assert predicted.paged == pool.usage.held * pool.block_bytes
    longest = ContiguousCache(MOE, len(lengths), max(lengths))
    assert predicted.contiguous == longest.keys.nbytes + longest.values.nbytes
    assert predicted.tokens == sum(lengths) * pool.block_bytes / block


# ------------------------------------------------------------------------------ bad input


@torch.no_grad()
def test_a_full_pool_says_so_and_goes_on_when_there_is_room():
    model, pool = build(), make_pool(n_blocks=3)
    pool.open("a"), pool.open("b")
    model(tokens(1, 8), cache=pool.batch(["a"]))
    batch, before = pool.batch(["b"]), pool.usage
    with pytest.raises(
        ValueError, match="needs 2, and of n_blocks=3 there are 1 free and 0 cached"
    ):
        model(tokens(1, 5), cache=batch)
    assert pool.usage == before
    pool.free("a")
    assert_close(model(tokens(1, 5), cache=batch).logits, model(tokens(1, 5)).logits)
    pool.free("b")
    pool.check()
    assert pool.usage.free == 3


@torch.no_grad()
def test_a_batch_of_sequences_that_have_changed_since_is_refused():
    model, pool = build(), make_pool()
    pool.open("a"), pool.open("b")
    one, other = pool.batch(["a"]), pool.batch(["a", "b"])
    model(tokens(1, 4), cache=one)
    with pytest.raises(ValueError, match="sequence 'a' has changed: make its batch anew"):
        model(tokens(2, 4), cache=other)
    both = pool.batch(["b", "a"])
    model(tokens(2, 4), cache=both)
    both.lengths[0], both.lengths[1] = 3, 9
    with pytest.raises(ValueError, match="length=9 is not from 0 to the 8 tokens stored"):
        model(tokens(2, 4), cache=both)
    both.lengths[1] = 8
    model(tokens(2, 4), cache=both)
    assert [pool.length(name) for name in "ab"] == [12, 7]
    with pytest.raises(ValueError, match="sequence 'a' is in the batch twice"):
        pool.batch(["a", "b", "a"])
    with pytest.raises(ValueError, match="a batch needs one at least"):
        pool.batch([])
    pool.free("a")
    with pytest.raises(ValueError, match="sequence 'a' is not open"):
        model(tokens(1, 4), cache=one)


def test_a_step_that_was_overtaken_writes_nothing():
    pool = make_pool()
    pool.open("a"), pool.open("b")
    one, other = pool.batch(["a"]), pool.batch(["b"])
    new = torch.ones(2, 1, 2, 4, 4)
    one.begin(4, None)
    other.begin(4, None)
    with pytest.raises(ValueError, match="the step was given up"):
        one.extend(0, *new)
    with pytest.raises(ValueError, match="the step was given up"):
        one.commit()
    assert pool.store.count_nonzero() == 0
    other.extend(0, *new), other.extend(1, *new), other.commit()
    assert pool.length("b") == 4 and pool.length("a") == 0


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"n_layers": 3}, {}, "made for n_layers=3, not n_layers=2"),
        ({"n_kv_heads": 4}, {}, "made for kv_heads=4, not kv_heads=2"),
        ({}, {"dtype": torch.float64}, "made for dtype=torch.float64, not dtype=torch.float32"),
        ({}, {"device": "meta"}, "made for device=meta, not device=cpu"),
    ],
)
def test_a_pool_for_another_model_is_refused_by_name(changes, options, message):
    pool = make_pool(dataclasses.replace(MOE, **changes), **options)
    pool.open("a"), pool.open("b")
    with pytest.raises(ValueError, match=message):
        build()(tokens(2, 3), cache=pool.batch(["a", "b"]))
    with pytest.raises(ValueError, match="made for batch=1, not batch=2"):
        build()(tokens(2, 3), cache=make_one())


def make_one() -> PagedBatch:
    pool = make_pool()
    pool.open("a")
    return pool.batch(["a"])


def test_a_pool_and_a_batch_print_what_they_hold():
    batch = make_one()
    assert repr(batch) == "PagedBatch(['a'], lengths=[0])"
    assert repr(batch.pool) == ("PagedCache(9, block=4, Usage(free=9, cached=0, used=0, held=0))")
