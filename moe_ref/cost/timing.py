"""Time and money: of a pass through a model, and of an exchange between machines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._validate import check_choice, check_sizes
from .counting import BYTES, Part, check_layout, check_pass, keys_seen, parts
from .machine import Machine
from .popularity import touched


@dataclass(frozen=True)
class Time:
    """What the time of one pass is made of, in seconds.

    `total` adds the terms up: kernels read and multiply in turns more than at once, and measured
    layers lie near the sum. `limit` is what perfect overlap would take. The two are at most a
    factor of 2 apart.

    Attributes:
        compute: multiplying.
        memory: reading weights and cache.
        exchange: sending rows to other machines, and home.
        overhead: starting kernels or operators, and what they do beside products.
        tokens: tokens that the pass reads.
        price: dollars for an hour of all machines; None: unknown.

    Example:
        >>> step = Time(compute=0.001, memory=0.02, exchange=0, overhead=0.004, tokens=32)
        >>> step.binds, round(step.total, 3), round(step.tokens_per_second)
        ('memory', 0.025, 1280)
    """

    compute: float
    memory: float
    exchange: float
    overhead: float
    tokens: float
    price: float | None = None

    @property
    def total(self) -> float:
        """All terms, one after the other."""
        return self.compute + self.memory + self.exchange + self.overhead

    @property
    def overlapped(self) -> float:
        """The time if the exchange of one half of the batch hides behind the work on the other."""
        return max(self.exchange, self.total - self.exchange)

    @property
    def limit(self) -> float:
        """The larger of compute and memory: no kernel is faster."""
        return max(self.compute, self.memory)

    @property
    def binds(self) -> str:
        """The name of the largest term."""
        terms = ("compute", "memory", "exchange", "overhead")
        return max(terms, key=lambda name: getattr(self, name))

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all sequences; for each of B sequences it is a B-th of that."""
        return self.tokens / self.total

    @property
    def dollars_per_million(self) -> float | None:
        """Dollars for a million tokens; None if the machine's price is unknown."""
        if self.price is None:
            return None
        return self.price / 3600 / self.tokens_per_second * 1e6


def time(
    model: Any,
    machine: Machine,
    *,
    batch: float = 1,
    tokens: int = 1,
    context: int = 0,
    dtype: str = "bfloat16",
    machines: int = 1,
    layout: str = "experts",
    imbalance: float = 1.0,
    popularity: Sequence[float] | Tensor | None = None,
    visited: float | None = None,
) -> Time:
    """Time of one forward pass: of prefill, of a decode step, or of a layer.

    | layout | a machine has | machines exchange |
    |---|---|---|
    | experts | its own sequences, dense weights, its share of the experts | rows, there and back |
    | tensor | all sequences, its share of every weight | sums of attention and feed-forward parts |

    Args:
        model: as in `parts`; for a layer, its parts alone.
        machine: what it runs on.
        batch: sequences, on all machines together.
        tokens: new tokens of each: the prompt in prefill, 1 in decode.
        context: tokens of each that were read before.
        dtype: of the weights, and of the products with them. What is not a weight has 16 bits at
            least: cache, activations, and the products of attention.
        machines: how many share the work.
        layout: how they share it.
        imbalance: rows of the busiest machine's experts, over the mean; the others wait for it.
        popularity: of the experts of a layer, as in `touched`.
        visited: experts of a layer that the pass visits, if that was measured; None: as many as
            independent tokens would. Tokens of one text resemble each other, and visit fewer.

    Raises:
        ValueError: if a number is impossible, a name is unknown, or machines without a link are to
            share work.

    Example:
        >>> from moe_ref.cost import MACHINES
        >>> moe = TransformerConfig(32_000, 4096, 32, 32, 14_336, n_kv_heads=8, n_experts=8, k=2)
        >>> step = time(moe, MACHINES["h100"], batch=16, context=1000, machines=2)
        >>> step.binds, f"{1000 * step.total:.1f} ms"
        ('memory', '20.0 ms')

    Source: the roofline, Williams et al. 2009; a link as latency and bandwidth: Hockney 1994.
    """
    check_pass(batch, tokens, context)
    check_choice("dtype", dtype, BYTES)
    check_layout(layout, machines)
    if visited is not None and not visited > 0:
        raise ValueError(f"visited={visited} must be more than 0")
    if imbalance < 1:
        raise ValueError(f"imbalance={imbalance} is busiest over mean, so at least 1")
    case = (batch, tokens, context, dtype, machines, layout, imbalance, popularity, visited)
    load = _Load(machine, *case)
    found = parts(model)
    read = sum(load.read(part) for part in found)
    return Time(
        compute=sum(load.compute(part) for part in found),
        memory=sum(load.read(part) / machine.read_rate(read, load.rows(part)) for part in found),
        exchange=sum(load.exchange(part) for part in found),
        overhead=sum(load.overhead(part) for part in found),
        tokens=batch * tokens,
        price=None if machine.price is None else machine.price * machines,
    )


@dataclass(frozen=True)
class _Load:
    """What one machine has to do for one part of a model, in one pass."""

    machine: Machine
    batch: float
    tokens: int
    context: int
    dtype: str
    machines: int
    layout: str
    imbalance: float
    popularity: Sequence[float] | Tensor | None
    visited: float | None

    @property
    def own(self) -> float:
        """Sequences of the busiest machine; where machines share each, its share of all."""
        least = 0.0 if self.layout == "tensor" else min(self.batch, 1.0)
        return max(self.batch / self.machines, least)

    @property
    def wide(self) -> str:
        """The dtype of what is not a weight."""
        return self.dtype if BYTES[self.dtype] > 2 else "bfloat16"

    def touched(self, part: Part) -> float:
        """Copies of the part that this machine reads, in each place."""
        n, split = part.n_experts, self.machines if self.layout == "tensor" else 1
        if n == 1:
            return 1 / split
        if self.visited is not None:
            return min(self.visited, n) / self.machines
        return touched(n, part.k, self.batch * self.tokens, self.popularity) / self.machines

    def rows(self, part: Part) -> float:
        """Rows of a product: tokens for each copy that is read."""
        if part.n_experts > 1:
            return self.batch * self.tokens * part.k / (self.touched(part) * self.machines)
        return self.tokens * (self.batch if self.layout == "tensor" else self.own)

    def compute(self, part: Part) -> float:
        here = self.own if part.n_experts == 1 else self.batch / self.machines * self.imbalance
        products = here * part.k * part.products * self.tokens
        mixing = here * part.mixing * keys_seen(self.tokens, self.context, part.window)
        rates = self.machine.rate(self.dtype), self.machine.rate(self.wide)
        return part.places * (products / rates[0] + mixing / rates[1])

    def read(self, part: Part) -> float:
        seen = min(self.context + self.tokens, part.window or self.context + self.tokens)
        cache = self.own * part.cached * seen * BYTES[self.wide]
        return part.places * (self.touched(part) * part.reads * BYTES[self.dtype] + cache)

    def exchange(self, part: Part) -> float:
        if self.machines == 1 or part.name not in ("attention", "dense", "experts"):
            return 0.0
        if not part.width:
            raise ValueError(f"the part {part.name!r} has no width: what it sends is unknown")
        row = part.width * BYTES[self.wide]
        if self.layout == "tensor":  # an all-reduce: each sum is gathered, then handed out
            sums = self.batch * self.tokens * row
            return 2 * part.places * all_to_all(self.machine, sums, self.machines)
        if part.n_experts == 1:
            return 0.0
        sent = self.own * self.tokens * part.k * row * self.imbalance
        there = all_to_all(self.machine, sent, self.machines)
        counts = all_to_all(self.machine, 0, self.machines)  # so that each knows what is to come
        return part.places * (counts + 2 * there)

    def overhead(self, part: Part) -> float:
        known, numbers = self.machine.overhead, self.machine.elementwise
        tokens = self.own * self.tokens
        if part.n_experts == 1:
            each = numbers.get(part.name, 0.0) * part.numbers * tokens
        else:
            each = known.get("expert", 0.0) * self.touched(part)
            each += numbers.get("expert", 0.0) * part.numbers * tokens * part.k
        return part.places * (known.get(part.name, 0.0) + each)


def all_to_all(machine: Machine, nbytes: float, machines: int) -> float:
    """Seconds of an exchange in which each machine sends every other an equal share of its bytes.

    Args:
        machine: with a link.
        nbytes: that each machine has for all, itself included.
        machines: how many take part.

    Raises:
        ValueError: if the machine has no link.

    Example:
        >>> from moe_ref.cost import MACHINES
        >>> round(all_to_all(MACHINES["h800"], 50e6, machines=8) * 1e6)
        885
    """
    check_sizes(machines=machines)
    if machines == 1:
        return 0.0
    if not machine.link_bandwidth:
        raise ValueError(f"machine={machine.name!r} has no link to share work over")
    leaving = nbytes * (machines - 1) / machines
    return machine.link_latency + leaving / machine.link_bandwidth
