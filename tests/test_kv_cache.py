"""Caches: what they hold, refuse and forget. That logits stay is in test_attention.py too."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ref.kv_cache import ContiguousCache, KVCache, next_positions

from .test_attention import CONFIGS, MOE, build, tokens
from .tools import assert_close


class PagedCache:
    """Another `KVCache`: pages from one pool, in whatever order they were free."""

    def __init__(self, config, batch, length, page=4):
        pages = batch * -(-length // page)
        shape = (config.n_layers, pages, config.kv_heads, page, config.head_features)
        self.keys, self.values = torch.zeros(2, *shape)
        self.free = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).tolist()
        self.tables, self.page = [[] for _ in range(batch)], page
        self.lengths = torch.zeros(batch, dtype=torch.long)
        self.made_for = ContiguousCache(config, batch, length).made_for

    def begin(self, seq, mask):
        mask = torch.ones(len(self.lengths), seq, dtype=torch.bool) if mask is None else mask
        at = next_positions(self.lengths, seq, mask)
        self.new = [(*place, int(at[tuple(place)])) for place in mask.nonzero().tolist()]
        self.ends = self.lengths + mask.sum(dim=1)
        for table, end in zip(self.tables, self.ends.tolist()):
            while len(table) * self.page < end:
                table.append(self.free.pop())

    def extend(self, layer, keys, values):
        return self.store(self.keys[layer], keys), self.store(self.values[layer], values)

    def store(self, pool, new):
        for row, column, at in self.new:
            pool[self.tables[row][at // self.page], :, at % self.page] = new[row, :, column]
        held = new.new_zeros(len(new), pool.shape[1], max(1, int(self.ends.max())), pool.shape[3])
        for row, (table, end) in enumerate(zip(self.tables, self.ends.tolist())):
            for at in range(end):
                held[row, :, at] = pool[table[at // self.page], :, at % self.page]
        return held

    def commit(self):
        self.lengths = self.ends


@given(
    st.sampled_from([*CONFIGS.values()]),
    st.sampled_from([ContiguousCache, PagedCache]),
    st.integers(1, 3).flatmap(
        lambda rows: st.lists(
            st.integers(1, 4).flatmap(
                lambda seq: st.lists(
                    st.lists(st.booleans(), min_size=seq, max_size=seq),
                    min_size=rows,
                    max_size=rows,
                )
            ),
            min_size=1,
            max_size=5,
        )
    ),
    st.integers(0, 99),
)
@torch.no_grad()
def test_logits_are_the_same_however_sequences_are_cut_and_padded(config, kind, masks, seed):
    decoder, rows = build(config, seed), len(masks[0])
    masks = [torch.tensor(mask) for mask in masks]
    lengths = sum(mask.sum(dim=1) for mask in masks)
    texts = [tokens(1, int(n), seed + row)[0] for row, n in enumerate(lengths)]
    cache = kind(config, rows, max(1, int(lengths.max())))
    assert isinstance(cache, KVCache)
    logits = [[torch.zeros(0, 50)] for _ in range(rows)]
    for mask in masks:
        batch = tokens(*mask.shape, seed)
        for row, held in enumerate(cache.lengths.tolist()):
            batch[row, mask[row]] = texts[row][held : held + int(mask[row].sum())]
        output = decoder(batch, mask=mask, cache=cache).logits
        for row in range(rows):
            logits[row].append(output[row, mask[row]])
    assert torch.equal(cache.lengths, lengths)
    for text, ours in zip(texts, logits):
        assert_close(torch.cat(ours), decoder(text[None]).logits[0])


@given(
    st.sampled_from([*CONFIGS.values()]),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.integers(0, 99),
)
def test_logits_are_the_same_however_the_tokens_are_cut_with_a_cache(config, pieces, seed):
    decoder = build(config, seed)
    whole = tokens(2, sum(pieces), seed)
    cache = ContiguousCache(config, 2, sum(pieces))
    with torch.no_grad():
        parts = [decoder(piece, cache=cache).logits for piece in whole.split(pieces, dim=1)]
        assert_close(torch.cat(parts, dim=1), decoder(whole).logits)
    assert cache.lengths.tolist() == [sum(pieces)] * 2


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, False], [True, True]])])
@torch.no_grad()
def test_a_step_that_breaks_half_way_leaves_no_trace(mask):
    decoder, caches = build(), [ContiguousCache(MOE, 2, 8) for _ in range(2)]
    for cache in caches:
        decoder(tokens(2, 3), cache=cache)

    def power_cut(*_):
        raise RuntimeError("power cut")

    hook = decoder.blocks[1].attention.register_forward_hook(power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        decoder(tokens(2, 4, seed=1), cache=caches[0])
    hook.remove()
    assert caches[0].lengths.tolist() == [3, 3]
    for seed in (2, 3):
        ours, expected = (decoder(tokens(2, 2, seed), mask=mask, cache=c).logits for c in caches)
        assert torch.equal(ours, expected)


@torch.no_grad()
def test_a_cache_whose_length_is_set_back_has_forgotten_the_last_tokens():
    decoder, cache = build(), ContiguousCache(MOE, 2, 8)
    whole = tokens(2, 6)
    decoder(whole, cache=cache)
    cache.lengths[1] = 2
    following = tokens(2, 1, seed=1)
    ours = decoder(following, cache=cache).logits
    assert_close(ours[0], decoder(torch.cat([whole[:1], following[:1]], 1)).logits[0, -1:])
    assert_close(ours[1], decoder(torch.cat([whole[1:, :2], following[1:]], 1)).logits[0, -1:])


def test_a_full_cache_says_how_much_room_it_has():
    cache = ContiguousCache(MOE, 2, 4)
    decoder = build()
    decoder(tokens(2, 3), mask=torch.tensor([[True] * 3, [True, False, False]]), cache=cache)
    with pytest.raises(ValueError, match="the cache has room for length=4 tokens, not 5"):
        decoder(tokens(2, 2), cache=cache)
    assert cache.lengths.tolist() == [3, 1]
    decoder(tokens(2, 2), mask=torch.tensor([[True, False], [True, True]]), cache=cache)
    assert cache.lengths.tolist() == [4, 3]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"batch": 3}, "made for batch=3, not batch=2"),
        ({"n_layers": 3}, {}, "made for n_layers=3, not n_layers=2"),
        ({"n_kv_heads": 4}, {}, "made for kv_heads=4, not kv_heads=2"),
        ({"d_model": 32}, {}, "made for head_features=8, not head_features=4"),
        ({}, {"dtype": torch.float64}, "made for dtype=torch.float64, not dtype=torch.float32"),
        ({}, {"device": "meta"}, "made for device=meta, not device=cpu"),
    ],
)
def test_a_cache_for_another_model_or_batch_is_refused_by_name(changes, options, message):
    config = dataclasses.replace(MOE, **changes)
    cache = ContiguousCache(config, **({"batch": 2, "length": 4} | options))
    with pytest.raises(ValueError, match=message):
        build()(tokens(2, 3), cache=cache)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[3], [5]], r"positions\[1, 0\]=5 must be 3, to follow the cache"),
        ([[2], [3]], r"positions\[0, 0\]=2 must be 3, to follow the cache"),
        ([[-1], [3]], r"positions\[0, 0\]=-1 must be 3"),
        ([[99], [3]], r"positions\[0, 0\]=99 must be 3"),
    ],
)
def test_positions_that_do_not_follow_the_cache_are_refused_by_name(positions, message):
    decoder, cache = build(), ContiguousCache(MOE, 2, 8)
    decoder(tokens(2, 3), cache=cache)
    with pytest.raises(ValueError, match=message):
        decoder(tokens(2, 1), positions=torch.tensor(positions), cache=cache)
    assert cache.lengths.tolist() == [3, 3]


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0)])
def test_a_cache_of_no_size_is_refused_by_name(batch, length):
    with pytest.raises(ValueError, match="=0 must be at least 1"):
        ContiguousCache(MOE, batch, length)


def test_a_cache_prints_its_sizes_and_lengths():
    assert repr(ContiguousCache(MOE, 2, 8)) == (
        "ContiguousCache(batch=2, n_layers=2, kv_heads=2, head_features=4, dtype=torch.float32,"
        " device=cpu, length=8, lengths=[0, 0])"
    )
