"""What a model costs: parameters, FLOPs, bytes, time and money, of a configuration on a machine.

cost.parameters(config)                               # total and active
cost.time(config, MACHINES["h100"], batch=32, context=4096)   # a decode step, and what binds it
cost.verdict(dense, moe, MACHINES["h100"], batch=32)  # which of the two, and why
"""

from .caching import CacheBytes, cache_bytes
from .counting import (
    BYTES,
    LAYOUTS,
    Memory,
    Parameters,
    Part,
    flops,
    keys_seen,
    memory,
    parameters,
    parts,
)
from .deciding import Side, Verdict, verdict
from .machine import MACHINES, Machine
from .popularity import shares_drawn, touched
from .timing import Time, all_to_all, time

__all__ = [
    "BYTES",
    "LAYOUTS",
    "MACHINES",
    "CacheBytes",
    "Machine",
    "Memory",
    "Parameters",
    "Part",
    "Side",
    "Time",
    "Verdict",
    "all_to_all",
    "cache_bytes",
    "flops",
    "keys_seen",
    "memory",
    "parameters",
    "parts",
    "shares_drawn",
    "time",
    "touched",
    "verdict",
]
