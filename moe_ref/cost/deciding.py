"""Dense or Mixture-of-Experts: both on one machine, side by side."""

import math
from dataclasses import dataclass, replace
from typing import Any

from .counting import LAYOUTS, Memory, Part, memory, parameters, parts
from .machine import Machine
from .timing import Time, time

WORDS = {"compute": "multiplying", "memory": "reading weights and cache"}
WORDS |= {"exchange": "sending rows", "overhead": "starting kernels"}


@dataclass(frozen=True)
class Side:
    """What a model takes in a case.

    Attributes:
        layout: how the machines share it: the faster one of those that fit.
        memory: what each machine holds.
        fits: whether a machine holds so much.
        step: the time of a decode step; it is the latency of a token, too.

    Example:
        >>> from moe_ref.cost import MACHINES
        >>> small = TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48)
        >>> verdict(small, small, MACHINES["h100"]).dense.fits
        True
    """

    layout: str
    memory: Memory
    fits: bool
    step: Time


@dataclass(frozen=True)
class Verdict:
    """Which of two models is right for a case, and why.

    Attributes:
        dense, moe: what each takes, as it is.
        matched: what a dense model of the MoE's quality takes.
        worth: parameters of that model.
        memory, latency, throughput: which of dense and moe takes less memory, makes a token
            sooner, makes more tokens in a second.
        quality_cost: which of moe and matched makes a token for less.
        winner: "dense" or "moe"; "neither" if none fits.
        reason: the same in a sentence.

    Example:
        >>> from moe_ref.cost import MACHINES
        >>> small = TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48)
        >>> verdict(small, small, MACHINES["h100"]).worth == parameters(small).total
        True
    """

    dense: Side
    moe: Side
    matched: Side
    worth: float
    memory: str
    latency: str
    throughput: str
    quality_cost: str
    winner: str
    reason: str

    def __str__(self) -> str:
        return self.reason


def verdict(
    dense: Any,
    moe: Any,
    machine: Machine,
    *,
    batch: float = 1,
    context: int = 1024,
    dtype: str = "bfloat16",
    machines: int = 1,
    worth: float | None = None,
) -> Verdict:
    """Compare a dense model with an MoE in decode, as they are and at equal quality.

    The winner is the cheaper at equal quality of those that fit into the memory. For equal quality
    the weights of the dense model are scaled to `worth` parameters, its attention and cache left
    as they are.

    Args:
        dense, moe: as in `parts`.
        machine: what they run on.
        batch: sequences that are decoded together.
        context: tokens of each so far.
        dtype: of the weights.
        machines: how many share the model.
        worth: parameters of a dense model of the MoE's quality. None: the geometric mean of the
            MoE's total and active parameters, a rule of thumb and no law. It depends on training:
            measure it, if you can.

    Raises:
        ValueError: as `time` does, or if `worth` is not more than 0.

    Example:
        >>> from moe_ref.cost import MACHINES
        >>> moe = TransformerConfig(32_000, 4096, 32, 32, 14_336, n_kv_heads=8, n_experts=8, k=2)
        >>> dense = TransformerConfig(32_000, 4096, 32, 32, 14_336, n_kv_heads=8)
        >>> print(verdict(dense, moe, MACHINES["h100"]))
        dense: the MoE needs 93.5 GB, more than 80 GB (H100 SXM)
        >>> found = verdict(dense, moe, MACHINES["h200"])
        >>> found.reason.partition(' of the same')[0]
        'MoE: a decode step costs 0.60 of that of a dense model'
    """
    counted = parameters(moe)
    worth = math.sqrt(counted.total * counted.active) if worth is None else worth
    if not worth > 0:
        raise ValueError(f"worth={worth} must be more than 0")
    case = {"batch": batch, "context": context, "dtype": dtype, "machines": machines}
    scaled = scale(dense, worth / parameters(dense).total)
    sides = {
        name: place(model, machine, case)
        for name, model in (("dense", dense), ("moe", moe), ("matched", scaled))
    }
    a, b, c = sides["dense"], sides["moe"], sides["matched"]
    cheaper = "moe" if b.step.total < c.step.total else "dense"
    winner = cheaper
    if not (b.fits and c.fits):
        winner = "moe" if b.fits else "dense" if c.fits or a.fits else "neither"
    return Verdict(
        **sides,
        worth=worth,
        memory="moe" if b.memory.total < a.memory.total else "dense",
        latency="moe" if b.step.total < a.step.total else "dense",
        throughput="moe" if b.step.tokens_per_second > a.step.tokens_per_second else "dense",
        quality_cost=cheaper,
        winner=winner,
        reason=explain(winner, sides, worth, machine, machines),
    )


def scale(model: Any, factor: float) -> list[Part]:
    """The parts of a model with `factor` times the weights, and attention and cache as they are.

    Example:
        >>> config = TransformerConfig(100, 32, n_layers=2, n_heads=4, d_ff=48)
        >>> parameters(scale(config, 2)).total / parameters(config).total
        2.0
    """
    return [
        replace(
            part,
            weights=round(part.weights * factor),
            flops=round(part.products * factor),
            read=round(part.reads * factor),
        )
        for part in parts(model)
    ]


def place(model: Any, machine: Machine, case: dict[str, Any]) -> Side:
    """A decode step in the faster layout of those that fit; if none does, of all."""
    sides = []
    for layout in LAYOUTS[: case["machines"]]:  # one machine has nothing to share
        held = memory(model, layout=layout, **case)
        step = time(model, machine, layout=layout, **case)
        sides.append(Side(layout, held, held.total <= machine.memory, step))
    return min(sides, key=lambda side: (not side.fits, side.step.total))


def explain(
    winner: str, sides: dict[str, Side], worth: float, machine: Machine, machines: int
) -> str:
    """The verdict in a sentence."""
    dense, moe, matched = (sides[name] for name in ("dense", "moe", "matched"))

    def needs(what: str, side: Side) -> str:
        each = "" if machines == 1 else " on each machine"
        room = f"{machine.memory / 1e9:.0f} GB ({machine.name})"
        return f"{what} needs {side.memory.total / 1e9:.1f} GB{each}, more than {room}"

    equal = f"a dense model of the same quality ({worth / 1e9:.3g}B parameters)"
    if winner == "neither":
        return f"neither: {needs('the dense model', dense)}; {needs('the MoE', moe)}"
    if not moe.fits:
        return f"dense: {needs('the MoE', moe)}"
    if not matched.fits:
        return f"MoE: {needs(equal, matched)}"
    ratio, room = moe.step.total / matched.step.total, moe.memory.total / matched.memory.total
    mostly = WORDS[(moe if winner == "moe" else matched).step.binds]
    if winner == "moe":
        told = f"MoE: a decode step costs {ratio:.2f} of that of {equal}, in {room:.1f} times its"
    else:
        told = f"dense: a decode step of {equal} costs {1 / ratio:.2f} of the MoE's, in"
        told += f" {1 / room:.1f} times its"
    return f"{told} memory; it is mostly {mostly}"
