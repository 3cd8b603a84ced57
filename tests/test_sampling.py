import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ref.sampling import Sampling, process, sample, uniforms

DRAW = Sampling(temperature=1.0)


class SplitMix64:
    """One number after the other, by the definition: a counter that grows, and is mixed."""

    def __init__(self, seed):
        self.state = seed

    def __next__(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        word = self.state
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        return word ^ word >> 31


def test_numbers_are_those_of_splitmix64_begun_at_its_first_number_for_the_seed():
    published = SplitMix64(1234567)  # outputs of the reference program, as published for it
    assert [next(published) for _ in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    for seed in (0, 1, 42, 2**64 - 1):
        counted = SplitMix64(next(SplitMix64(seed)))
        expected = [(next(counted) >> 11) / 2**53 for _ in range(20)]
        assert uniforms([seed] * 20, range(20)) == expected


def test_numbers_of_nearby_seeds_and_positions_are_uniform_and_independent():
    n = 200
    grid = torch.tensor([uniforms([seed] * n, range(n)) for seed in range(n)], dtype=torch.float64)
    assert grid.min() >= 0 and grid.max() < 1
    for pair in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:]), (grid, grid.T.flip(1))):
        cells = (pair[0] * 8).long() * 8 + (pair[1] * 8).long()
        counts = torch.bincount(cells.flatten(), minlength=64).double()
        expected = counts.sum() / 64
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert 24 < chi2 < 124  # 63 degrees of freedom: mean 63, standard deviation 11


def test_draws_follow_the_softmax_at_the_temperature():
    n, logits = 20_000, torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    drawn = sample(
        logits.expand(n, -1), Sampling(temperature=0.7), seeds=range(n), positions=[5] * n
    )
    shares = torch.bincount(drawn, minlength=4) / n
    # 4 standard deviations of a share of one half.
    assert (shares - (logits[0] / 0.7).softmax(dim=-1)).abs().max() < 4 * 0.5 / math.sqrt(n)


@given(st.integers(0, 999), st.integers(1, 6))
def test_the_token_is_the_one_in_whose_stretch_the_number_falls(seed, rows):
    torch.manual_seed(seed)
    logits = torch.randn(rows, 9) * 3
    seeds, positions = list(range(seed, seed + rows)), list(range(7, 7 + rows))
    drawn = sample(logits, DRAW, seeds=seeds, positions=positions).tolist()
    numbers = uniforms(seeds, positions)
    for row, token, number in zip(logits.double(), drawn, numbers, strict=True):
        shares = row.softmax(dim=-1).tolist()
        assert sum(shares[:token]) - 1e-6 <= number <= sum(shares[: token + 1]) + 1e-6


def test_a_draw_depends_on_its_own_row_seed_and_position_alone():
    torch.manual_seed(0)
    logits = torch.randn(8, 50)
    seeds, positions = [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]
    together = sample(logits, DRAW, seeds=seeds, positions=positions).tolist()
    alone = [
        sample(logits[i : i + 1], DRAW, seeds=[seeds[i]], positions=[positions[i]]).item()
        for i in range(8)
    ]
    assert together == alone


def test_tokens_of_share_zero_are_never_drawn():
    logits = torch.full((5_000, 7), -torch.inf)
    logits[:, 3] = logits[:, 5] = 0.0
    drawn = sample(logits, DRAW, seeds=range(5_000), positions=[0] * 5_000)
    assert set(drawn.tolist()) == {3, 5}


@given(st.integers(0, 999), st.floats(0.05, 1.0))
def test_top_p_draws_only_from_the_smallest_set_that_fills_it(seed, top_p):
    torch.manual_seed(seed)
    logits = torch.randn(1, 8)
    shares = logits.softmax(dim=-1)[0]
    nucleus, filled = set(), 0.0
    for token in shares.argsort(descending=True).tolist():
        nucleus.add(token)
        filled += shares[token].item()
        if filled >= top_p + 1e-6:
            break
    sampling = Sampling(temperature=1.0, top_p=top_p)
    drawn = sample(logits.expand(200, -1), sampling, seeds=range(200), positions=[seed] * 200)
    assert set(drawn.tolist()) <= nucleus


@pytest.mark.parametrize(
    ("shares", "filters", "kept"),
    [
        ([0.5, 0.25, 0.25], {"top_p": 0.5}, {0}),
        ([0.5, 0.25, 0.25], {"top_p": 0.75}, {0, 1}),  # of equals, the lower id
        ([0.25, 0.25, 0.25, 0.25], {"top_p": 0.75}, {0, 1, 2}),
        ([0.5, 0.5, 0.0], {"top_p": 0.5}, {0}),
        ([0.125, 0.25, 0.25, 0.25, 0.125], {"top_p": 0.5}, {1, 2}),
        ([0.125, 0.25, 0.5, 0.125], {"top_p": 1e-9}, {2}),  # the likeliest always stays
        ([0.5, 0.25, 0.125, 0.125], {"top_k": 2}, {0, 1}),
        ([0.5, 0.25, 0.25], {"top_k": 2}, {0, 1, 2}),  # as likely as the last of the k
        ([0.5, 0.25, 0.25], {"top_k": 9}, {0, 1, 2}),
        ([0.5, 0.25, 0.125, 0.125], {"min_p": 0.5}, {0, 1}),
        ([0.5, 0.25, 0.125, 0.125], {"min_p": 1.0}, {0}),
        # The second filter sees the shares that the first one left: 2/3 and 1/3.
        ([0.5, 0.25, 0.125, 0.125], {"top_k": 2, "top_p": 0.6}, {0}),
        ([0.5, 0.25, 0.125, 0.125], {"top_p": 0.6}, {0, 1}),
    ],
)
def test_filters_keep_exactly_the_tokens_of_their_definition(shares, filters, kept):
    logits = torch.tensor([shares]).log()
    assert logits.softmax(dim=-1).tolist() == [shares]
    processed = process(logits, Sampling(temperature=1.0, **filters))
    assert set(processed[0].isfinite().nonzero()[:, 0].tolist()) == kept
    assert torch.equal(processed[0, list(kept)], logits[0, list(kept)])


def test_a_penalty_lowers_the_logits_of_seen_tokens_whatever_their_sign():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, repetition_penalty=2.0)
        assert process(logits, sampling, seen).tolist() == [[1.0, -4.0, 2.0, -2.0]]
    assert sample(logits, Sampling(repetition_penalty=2.0), seen=seen).tolist() == [2]


def test_logits_stay_as_they_are_and_no_answer_is_narrower_than_float32():
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    everything = Sampling(0.5, top_k=2, top_p=0.9, min_p=0.1, repetition_penalty=1.5)
    before = logits.clone()
    assert process(logits, everything, torch.ones(1, 3, dtype=torch.bool)).dtype == torch.float32
    assert process(logits.double(), DRAW).dtype == torch.float64
    assert torch.equal(logits, before)


def test_logits_that_are_no_numbers_give_an_id_all_the_same():
    logits = torch.full((1, 5), torch.nan)
    for sampling in (DRAW, Sampling(), Sampling(temperature=1.0, top_k=2, top_p=0.5)):
        assert 0 <= sample(logits, sampling, seeds=[0], positions=[0]).item() < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be 0 .the likeliest token. or a number"),
        ({"temperature": math.nan}, "temperature=nan must be 0"),
        ({"temperature": math.inf}, "temperature=inf must be 0"),
        ({"temperature": 1e-9}, "temperature=1e-09 must be 0 .* from 1e-06 up"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_k": 2.5}, "top_k=2.5 must be a whole number"),
        ({"top_p": 0.0}, "top_p=0.0 is not more than 0 and at most 1"),
        ({"top_p": math.nan}, "top_p=nan is not more than 0"),
        ({"min_p": 1.1}, "min_p=1.1 is not 0 to 1"),
        ({"min_p": -0.1}, "min_p=-0.1 is not 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be a number above 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_what_a_row_lacks_is_named():
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="seeds: 0 for 2 rows; give one for each"):
        sample(logits, DRAW)
    with pytest.raises(ValueError, match="positions: 1 for 2 rows"):
        sample(logits, DRAW, seeds=[1, 2], positions=[1])
    with pytest.raises(ValueError, match="repetition_penalty=1.2 needs seen, the tokens so far"):
        sample(logits, Sampling(repetition_penalty=1.2))
