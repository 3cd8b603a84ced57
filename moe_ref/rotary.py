"""Rotary positions: features of queries and keys, turned in pairs by angles of the position."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ._validate import check_sizes


@dataclass(frozen=True)
class Yarn:
    """Slower angles, for texts longer than those of the training.

    A pair of features that turns more than `beta_fast` times within `original_length` positions
    keeps its speed; one that turns less than `beta_slow` times is slowed down by `factor`; between
    the two the speed falls in a straight line over the pairs.

    Args:
        factor: how many times longer texts may be.
        original_length: positions of the training.
        beta_fast, beta_slow: turns within `original_length`.
        truncate: whether the line begins and ends at whole pairs.
        attention_factor: factor on cosines and sines; None: 0.1 ln(factor) + 1.

    Raises:
        ValueError: if `factor` is below 1, or `beta_fast` not above `beta_slow`.

    Example:
        >>> yarn = Yarn(factor=32.0, original_length=4096)
        >>> round(yarn.amplitude, 3)
        1.347

    Source: Peng et al. 2023 (2309.00071), section 3.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        check_sizes(original_length=self.original_length)
        if self.factor < 1:
            raise ValueError(f"factor={self.factor} must be at least 1")
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"beta_fast={self.beta_fast} must be above beta_slow={self.beta_slow}, and that"
                " above 0"
            )

    @property
    def amplitude(self) -> float:
        """The factor on cosines and sines."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1

    def slow_down(self, speeds: Float[Tensor, " half"], theta: float) -> Float[Tensor, " half"]:
        """The angle of each pair from one position to the next, given that without YaRN."""
        pairs = len(speeds)

        def pair_that_turns(times: float) -> float:
            return pairs * math.log(self.original_length / (times * 2 * math.pi)) / math.log(theta)

        first, last = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        index = torch.arange(pairs, device=speeds.device, dtype=torch.float32)
        slowed = ((index - first) / max(last - first, 0.001)).clamp(0, 1)
        return speeds * (1 - slowed) + speeds / self.factor * slowed


def rotary_angles(
    positions: Int[Tensor, "*rows seq"], features: int, theta: float, yarn: Yarn | None = None
) -> Float[Tensor, "*rows seq half"]:
    """position * theta^(-2i / features), float32. Source: RoFormer, Su et al. 2021 (2104.09864)."""
    exponents = torch.arange(0, features, 2, device=positions.device, dtype=torch.float32)
    speeds = theta ** -(exponents / features)
    if yarn is not None:
        speeds = yarn.slow_down(speeds, theta)
    return positions.float()[..., None] * speeds


def cos_sin(
    angles: Float[Tensor, "*rows seq half"], amplitude: float = 1.0
) -> tuple[Float[Tensor, "*rows seq features"], Float[Tensor, "*rows seq features"]]:
    """Cosines and sines as `rotate` takes them, for both features of each pair.

    The first gets first * cos - second * sin, the second gets second * cos + first * sin.
    """
    cos, sin = amplitude * angles.cos(), amplitude * angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(
    x: Float[Tensor, "batch heads seq features"],
    cos: Float[Tensor, "#batch 1 seq features"],
    sin: Float[Tensor, "#batch 1 seq features"],
) -> Float[Tensor, "batch heads seq features"]:
    """Turn feature i and feature i + half, as a pair, by angle i of the position; see `cos_sin`."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)  # autocast makes x narrower than the model
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def check_heads(d_model: int, n_heads: int, n_kv_heads: int, d_head: int | None = None) -> None:
    """Raise a ValueError unless the heads have an even number of features and can be grouped."""
    check_sizes(d_model=d_model, n_heads=n_heads)
    if d_head is None and d_model % (2 * n_heads):
        raise ValueError(
            f"n_heads={n_heads} does not divide d_model={d_model} into heads of an even number of"
            " features"
        )
    if d_head is not None and (d_head < 2 or d_head % 2):
        raise ValueError(f"d_head={d_head} is no even number of features, 2 or more")
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(f"n_kv_heads={n_kv_heads} does not divide n_heads={n_heads}")
