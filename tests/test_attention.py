"""Attention, positions and caches: sequences that share a batch are as they are alone."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moe_ref import Transformer, TransformerConfig, attention
from moe_ref.attention import Attention, attend, cos_sin, prepare, rotary_angles, rotate
from moe_ref.kv_cache import ContiguousCache

from .tools import assert_close

DENSE = TransformerConfig(50, 16, 2, 4, 24, n_kv_heads=4)
GROUPED = dataclasses.replace(DENSE, n_kv_heads=2)
MOE = dataclasses.replace(GROUPED, n_experts=4, k=2, d_ff=12)
MIXED = dataclasses.replace(MOE, every=2, d_shared=8, n_kv_heads=1)
WINDOWED = dataclasses.replace(GROUPED, windows=(3, None), qk_norm="heads", d_head=6)
SINKS = dataclasses.replace(DENSE, windows=(None, 4), sinks=True, qk_norm="all", qkv_bias=True)
CONFIGS = {"dense": DENSE, "grouped": GROUPED, "moe": MOE, "mixed": MIXED}
CONFIGS |= {"windowed": WINDOWED, "sinks": SINKS}
LENGTHS, NEW = [3, 9, 1, 6, 4], 8


def build(config=MOE, seed=0):
    torch.manual_seed(seed)
    return Transformer(config).eval()


def tokens(batch, seq, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 50, (batch, seq), generator=generator)


def pad(texts, side):
    """One batch of texts of different length; a padding token's position is nonsense."""
    longest = max(map(len, texts))
    batch, mask = torch.zeros(len(texts), longest, dtype=torch.long), torch.zeros(len(texts), 1)
    mask = mask.expand(-1, longest).bool().clone()
    for row, text in enumerate(texts):
        own = slice(0, len(text)) if side == "right" else slice(longest - len(text), None)
        batch[row, own], mask[row, own] = text, True
    return batch, mask, (mask.long().cumsum(dim=1) - 1).masked_fill(~mask, -1)


# ------------------------------------------------------------------------------ mathematics


def test_attention_is_that_of_the_formula_query_by_query():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 6), torch.randn(2, 2, 8, 6), torch.randn(2, 2, 8, 6)
    ours = attend(q, k, v, torch.ones(1, 1, 5, 8, dtype=torch.bool).tril(3))
    for head in range(4):
        for i in range(5):
            seen = slice(0, i + 4)  # query 0 stands beside key 3
            scores = torch.einsum("bf,bsf->bs", q[:, head, i], k[:, head // 2, seen]) / 6**0.5
            expected = torch.einsum("bs,bsf->bf", scores.softmax(dim=-1), v[:, head // 2, seen])
            assert_close(ours[:, head, i], expected)


def test_a_sink_takes_its_share_of_the_attention_and_gives_nothing():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 6), torch.randn(2, 2, 5, 6), torch.randn(2, 2, 5, 6)
    sinks = torch.randn(4, requires_grad=True)
    ours = attend(q, k, v, scale=0.3, sinks=sinks)
    rows = []
    for head in range(4):
        for i in range(5):
            scores = 0.3 * torch.einsum("bf,bsf->bs", q[:, head, i], k[:, head // 2, : i + 1])
            total = scores.exp().sum(dim=-1, keepdim=True) + sinks[head].exp()
            weights = scores.exp() / total
            rows.append(torch.einsum("bs,bsf->bf", weights, v[:, head // 2, : i + 1]))
            assert_close(ours[:, head, i], rows[-1])
    expected = torch.stack(rows, dim=1).unflatten(1, (4, 5))
    factors = torch.randn(2, 4, 5, 6)
    (mine,) = torch.autograd.grad((ours * factors).sum(), sinks)
    (theirs,) = torch.autograd.grad((expected * factors).sum(), sinks)
    assert_close(mine, theirs)


def test_a_window_shows_a_query_so_many_tokens_and_no_more():
    decoder = build(dataclasses.replace(DENSE, n_layers=1, windows=(3,)))
    before, after = tokens(1, 9), tokens(1, 9)
    after[0, 2] = (after[0, 2] + 1) % 50
    one, other = decoder(before).logits[0], decoder(after).logits[0]
    changed = (one - other).abs().amax(dim=-1) > 1e-6
    assert changed.tolist() == [False, False, True, True, True, False, False, False, False]


@given(st.integers(0, 500), st.integers(1, 60), st.integers(0, 99))
def test_rotated_products_depend_on_the_distance_alone(start, distance, seed):
    torch.manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 4)

    def product(at):
        angles = rotary_angles(torch.tensor([[at], [at + distance]]), 4, 10_000.0)[:, None]
        (q_cos, k_cos), (q_sin, k_sin) = (turn.split(1) for turn in cos_sin(angles))
        return (rotate(q, q_cos, q_sin) * rotate(k, k_cos, k_sin)).sum()

    assert (product(start) - product(0)).abs() < 1e-3


# ------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_prompts_of_different_length_decode_together_as_alone_and_as_uncached(name, side, explicit):
    decoder = build(CONFIGS[name])
    texts = [tokens(1, n + NEW, seed)[0] for seed, n in enumerate(LENGTHS)]
    batch, mask, positions = pad([text[:n] for text, n in zip(texts, LENGTHS)], side)
    cache = ContiguousCache(decoder.config, len(texts), max(LENGTHS) + NEW)
    prefill = decoder(batch, mask=mask, cache=cache, positions=positions if explicit else None)
    assert cache.lengths.tolist() == LENGTHS
    assert all(r.counts.sum() == sum(LENGTHS) * r.experts.shape[1] for r in prefill.routings)
    together = [[*prefill.logits[row, mask[row]]] for row in range(len(texts))]
    for step in range(NEW):
        column = torch.stack([text[n + step] for text, n in zip(texts, LENGTHS)])[:, None]
        at = cache.lengths[:, None] if explicit else None
        for row, logits in zip(together, decoder(column, positions=at, cache=cache).logits):
            row.append(logits[0])
    for n, text, ours in zip(LENGTHS, texts, together):
        assert_close(torch.stack(ours), decoder(text[None]).logits[0])
        cache = ContiguousCache(decoder.config, 1, n + NEW)
        pieces = text[None].split([n] + [1] * NEW, dim=1)
        alone = torch.cat([decoder(piece, cache=cache).logits for piece in pieces], dim=1)
        assert_close(torch.stack(ours), alone[0])


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_a_padded_batch_are_the_sum_of_those_of_its_sequences(name, side, explicit):
    decoder = build(CONFIGS[name])
    texts = [tokens(1, n, seed)[0] for seed, n in enumerate(LENGTHS)]
    batch, mask, positions = pad(texts, side)
    logits = decoder(batch, mask=mask, positions=positions if explicit else None).logits
    expected = [decoder(text[None]).logits[0] for text in texts]
    for row, own in enumerate(expected):
        assert_close(logits[row, mask[row]], own)
    ours = torch.autograd.grad(logits[mask].square().sum(), [*decoder.parameters()])
    alone = torch.autograd.grad(torch.cat(expected).square().sum(), [*decoder.parameters()])
    for one, other in zip(ours, alone, strict=True):
        assert_close(one, other, floor=1e-2)


def test_tokens_in_any_order_are_what_their_positions_say():
    decoder, text = build(), tokens(2, 9)
    order = torch.stack(
        [torch.randperm(9, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    )
    shuffled = decoder(text.gather(1, order), positions=order).logits
    expected = decoder(text).logits.gather(1, order[..., None].expand(-1, -1, 50))
    assert_close(shuffled, expected)
    ours = torch.autograd.grad(shuffled.square().sum(), [*decoder.parameters()])
    sorted_ = torch.autograd.grad(expected.square().sum(), [*decoder.parameters()])
    for one, other in zip(ours, sorted_, strict=True):
        assert_close(one, other, floor=1e-2)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_not_routed_and_changes_no_other_logit(side):
    decoder, short = build(), tokens(1, 7)
    padding = torch.tensor([[3, 1, 4, 1, 5]])
    long = torch.cat([short, padding] if side == "right" else [padding, short], dim=1)
    mask = pad([short[0], long[0]], side)[1][:1]
    output = decoder(long, mask=mask)
    assert_close(output.logits[mask], decoder(short).logits[0])
    assert all(routing.counts.sum() == 7 * 2 for routing in output.routings)


def test_a_sequence_of_nothing_but_padding_makes_no_nan():
    decoder, mask = build(), torch.tensor([[True, True], [False, False]])
    cache = ContiguousCache(MOE, 2, 4)
    assert decoder(tokens(2, 2), mask=mask, cache=cache).logits.isfinite().all()
    assert decoder(tokens(2, 2), mask=mask & False, cache=cache).logits.isfinite().all()
    assert decoder(tokens(2, 2), mask=mask.flip(0)).logits.isfinite().all()
    assert decoder(tokens(2, 2), mask=mask, positions=mask.int()).logits.isfinite().all()
    assert cache.lengths.tolist() == [2, 0]
    # Not every kernel knows what to do where nothing is seen: each row sees at least one key.
    x, left = torch.zeros(2, 2, 16), mask & torch.tensor([False, True])
    for step in (prepare(MOE, x, mask=left), prepare(MOE, x, mask=mask, cache=cache)):
        assert step.visible.any(dim=-1).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"positions": torch.arange(3)},
            r"positions: shape \[3\], torch.int64; the tokens ask for \[2",
        ),
        (
            {"positions": torch.zeros(2, 3)},
            "positions: .* torch.float32; the tokens ask for .* torch.int64",
        ),
        ({"positions": torch.tensor([[0, 1, 2], [0, -1, 2]])}, r"positions\[1, 1\]=-1 must be 0"),
        (
            {"mask": torch.ones(2, 4).bool()},
            r"mask: shape \[2, 4\], torch.bool; the tokens ask for \[2, 3\]",
        ),
        ({"mask": torch.ones(2, 3)}, "mask: .* torch.float32; the tokens ask for .* torch.bool"),
    ],
)
def test_positions_and_masks_that_do_not_fit_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        build()(tokens(2, 3), **arguments)


def test_heads_that_do_not_divide_the_features_are_refused_by_name():
    with pytest.raises(ValueError, match="n_heads=5 does not divide d_model=32"):
        Attention(32, 5, 5)
    with pytest.raises(ValueError, match="n_kv_heads=3 does not divide n_heads=4"):
        Attention(32, 4, 3)


# ------------------------------------------------------------------------------ speed


@torch.no_grad()
def test_no_mask_is_made_where_none_is_needed_and_angles_are_made_once(monkeypatch):
    decoder, seen, made = build(), [], []
    ours, angles = F.scaled_dot_product_attention, attention.rotary_angles

    def attend(*args, **kwargs):
        seen.append((kwargs["attn_mask"] is not None, kwargs["is_causal"]))
        return ours(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(attention, "rotary_angles", lambda *a: made.append(1) or angles(*a))

    def kernel(*args, **kwargs):
        seen.clear(), made.clear()
        decoder(*args, **kwargs)
        assert len(seen) == MOE.n_layers and len(made) == 1
        assert len(set(seen)) == 1
        return {(False, True): "causal", (False, False): "all", (True, False): "mask"}[seen[0]]

    padded = torch.tensor([[True, True, True], [True, False, False]])
    assert kernel(tokens(2, 3)) == "causal"
    assert kernel(tokens(2, 3), mask=padded) == "causal"
    assert kernel(tokens(2, 3), mask=padded.flip(1)) == "mask"
    cache = ContiguousCache(MOE, 2, 12)
    assert kernel(tokens(2, 3), cache=cache) == "causal"
    assert kernel(tokens(2, 1), cache=cache) == "all"
    assert kernel(tokens(2, 2), cache=cache) == "mask"
    assert kernel(tokens(2, 3), mask=padded | True, cache=cache) == "mask"
    assert kernel(tokens(2, 1), mask=padded[:, 1:2], cache=cache) == "mask"
    assert kernel(tokens(2, 1), cache=cache) == "mask"
