"""From the logits of the next token to its id: penalty and filters, then one random number.

    logits -> repetition penalty -> / temperature -> top-k -> top-p -> min-p -> shares -> draw

Which token a sequence draws depends on its shares, its seed and the token's position, and on
nothing else: not on the other rows of a batch, padding, or how many steps came before.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ._validate import check_sizes

COOLEST = 1e-6  # of the temperatures above 0: logits divided by much less overflow


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen among all.

    Args:
        temperature: what logits are divided by; 0: the likeliest token, ties to the lower id, and
            no filter.
        top_k: keep the k likeliest tokens, and those as likely as the last of them; None: all.
        top_p: keep the fewest likeliest tokens whose shares add up to it; 1: all.
        min_p: keep tokens whose share is at least this part of the likeliest one's; 0: all.
        repetition_penalty: a token that was seen has its logit divided by it, or, if that is
            negative, multiplied by it; 1: no penalty.

    Raises:
        ValueError: if one of them is impossible.

    Example:
        >>> Sampling(temperature=0.7, top_p=0.9).top_p
        0.9

    Source: top-k: Fan et al. 2018 (1805.04833); top-p: Holtzman et al. 2019 (1904.09751); min-p:
    Nguyen et al. 2024 (2407.01082); repetition penalty: Keskar et al. 2019 (1909.05858).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not COOLEST <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} must be 0 (the likeliest token) or a number from"
                f" {COOLEST} up"
            )
        if self.top_k is not None:
            check_sizes(top_k=self.top_k)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} is not 0 to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be a number above 0"
            )


def process(
    logits: Float[Tensor, "batch vocab"],
    sampling: Sampling,
    seen: Bool[Tensor, "batch vocab"] | None = None,
) -> Float[Tensor, "batch vocab"]:
    """The logits of the distribution that tokens are drawn from; -inf: never drawn.

    The steps, and their order, are those of transformers. At temperature 0 the penalty is all.

    Args:
        logits: of the next token.
        sampling: penalty, temperature and filters.
        seen: the tokens that each sequence holds so far; only the penalty needs it.

    Returns:
        New logits, float32 or wider; if nothing changes, perhaps the same tensor.

    Raises:
        ValueError: if there is a penalty and no `seen`.

    Example:
        >>> process(torch.tensor([[1.0, 3.0, 2.0]]), Sampling(temperature=0.5, top_k=2))
        tensor([[-inf, 6., 4.]])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if (penalty := sampling.repetition_penalty) != 1:
        if seen is None:
            raise ValueError(f"repetition_penalty={penalty} needs seen, the tokens so far")
        logits = torch.where(
            seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits
        )
    if sampling.temperature == 0:
        return logits
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        last = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < last, -torch.inf)
    if sampling.top_p < 1:
        logits = logits.masked_fill(_beyond(logits, sampling.top_p), -torch.inf)
    if sampling.min_p > 0:
        shares = logits.softmax(dim=-1)
        least = sampling.min_p * shares.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(shares < least, -torch.inf)
    return logits


def _beyond(logits: Float[Tensor, "batch vocab"], top_p: float) -> Bool[Tensor, "batch vocab"]:
    """The tokens past the nucleus: the least likely, as long as they add up to 1 - top_p at most.

    Summed from the least likely on, as transformers does: it is a question of the last bit. Of
    tokens as likely as the last that stays, those with the lower ids stay.
    """
    rising, vocab = _rising(logits), logits.shape[-1]
    past = (rising.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p).sum(dim=-1, keepdim=True)
    past = past.clamp(max=vocab - 1)  # the likeliest always stays
    last = rising.gather(-1, past)
    level = logits == last
    stay = vocab - past - (logits > last).sum(dim=-1, keepdim=True)  # of those level with the last
    return (logits < last) | level & (level.cumsum(dim=-1) > stay)


def _rising(logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
    """Each row sorted: on a CPU by numpy, which takes a ninth of torch's time for 2,048 values."""
    if logits.device.type != "cpu":
        return logits.sort(dim=-1).values
    return torch.from_numpy(np.sort(logits.detach().numpy(), axis=-1))


def sample(
    logits: Float[Tensor, "batch vocab"],
    sampling: Sampling,
    *,
    seeds: Sequence[int] = (),
    positions: Sequence[int] = (),
    seen: Bool[Tensor, "batch vocab"] | None = None,
) -> Int[Tensor, " batch"]:
    """The id of one token for each row.

    The shares of a row, added up by id, cut the line from 0 to 1 into stretches; the token is the
    one in whose stretch the random number of (seed, position) falls. Adding up from the likeliest
    token on would need a sort, which takes over 20 times as long for 16 rows of 2,048 tokens, and
    tokens that are nearly level would change places with the last bit of their logits.

    Args:
        logits: of the next token.
        sampling: how to choose.
        seeds: of each row; not read at temperature 0.
        positions: of the token in each sequence, from 0, the prompt included; not read at
            temperature 0.
        seen: as in `process`.

    Raises:
        ValueError: if seeds or positions are not one for each row, or as `process` does.

    Example:
        >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), Sampling())
        tensor([1])
        >>> draw = Sampling(temperature=1.0)
        >>> sample(torch.zeros(3, 10), draw, seeds=[7, 7, 8], positions=[4, 5, 4])
        tensor([3, 1, 5])
    """
    logits = process(logits, sampling, seen)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    for name, given in (("seeds", seeds), ("positions", positions)):
        if len(given) != len(logits):
            raise ValueError(f"{name}: {len(given)} for {len(logits)} rows; give one for each")
    # Sums in float64, so that rounding moves no edge; Apple's GPUs have float32 alone.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    edges = logits.softmax(dim=-1).cumsum(dim=-1, dtype=wide)
    drawn = torch.tensor(uniforms(seeds, positions), dtype=wide, device=logits.device)[:, None]
    ids = torch.searchsorted(edges, drawn * edges[:, -1:], right=True)
    return ids[:, 0].clamp(max=logits.shape[-1] - 1)  # of NaN shares: an id, not a crash


GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, made odd
WORD = 2**64 - 1


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> list[float]:
    """One number from [0, 1) for each (seed, position), of 53 random bits.

    SplitMix64 gives number i of its sequence without those before it. Its first number for a seed,
    and not the seed itself, begins the sequence that the positions count through: sequences of
    nearby seeds share nothing. Half a microsecond each; numpy's Philox takes 9, or 70 for a batch.

    Example:
        >>> [round(x, 4) for x in uniforms([0, 0, 1], [0, 1, 0])]
        [0.6524, 0.7012, 0.3682]

    Source: Steele, Lea and Flood 2014 (doi 10.1145/2660193.2660195).
    """
    begun = [_mix(seed + GOLDEN) for seed in seeds]
    return [
        (_mix(begin + GOLDEN * (position + 1)) >> 11) * 2.0**-53
        for begin, position in zip(begun, positions, strict=True)
    ]


def _mix(word: int) -> int:
    """A permutation of the 64-bit words in which each bit turns on all others."""
    word &= WORD
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & WORD
    return word ^ (word >> 31)
