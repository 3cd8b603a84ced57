"""Naive specifications of the pieces, and the exercise checks built on them.

An exercise check takes the reader's function, tries it on small cases first (ties, idle experts,
one token, every expert chosen), and prints a verdict or raises with the first case it gets wrong.
"""

from .beyond_language import admit_by_score, multi_gate, patchify
from .layer import (
    balance_tokens,
    capacity_limit,
    combine,
    drop_overflow,
    expert_choice,
    ffn_cost,
    group_limited,
    load,
    moe_forward,
    padding_waste,
    parameter_count,
    permutation,
    reroute,
    swiglu,
    top_k_routing,
)
from .specialisation import agreement, mutual_information, route_without
from .specification import feed_forward, gelu, largest, moe, relu, route, silu, softmax
from .training import balance_loss, bias_update, rotary, steps_to_reach, upcycle_ffn

__all__ = [
    "admit_by_score",
    "agreement",
    "balance_loss",
    "balance_tokens",
    "bias_update",
    "capacity_limit",
    "combine",
    "drop_overflow",
    "expert_choice",
    "feed_forward",
    "ffn_cost",
    "gelu",
    "group_limited",
    "largest",
    "load",
    "moe",
    "moe_forward",
    "multi_gate",
    "mutual_information",
    "padding_waste",
    "parameter_count",
    "patchify",
    "permutation",
    "relu",
    "reroute",
    "rotary",
    "route",
    "route_without",
    "silu",
    "softmax",
    "steps_to_reach",
    "swiglu",
    "top_k_routing",
    "upcycle_ffn",
]
