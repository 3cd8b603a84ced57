"""The exercise checks of the course, one file for each notebook.

A check takes the reader's function, tries it on small cases first (ties, idle experts, one token,
every expert chosen), and prints a verdict or raises with the first case it gets wrong.
"""

from .nb00 import expert_counts
from .nb01 import balance_tokens, ffn_cost, swiglu
from .nb02 import moe_forward, parameter_count, top_k_routing
from .nb03 import expert_choice, group_limited
from .nb04 import combine, padding_waste, permutation
from .nb05 import capacity_limit, drop_overflow, reroute
from .nb06 import balance_loss, bias_update
from .nb07 import rotary, steps_to_reach, upcycle_ffn
from .nb08 import agreement, mutual_information, route_without
from .nb09 import admit_by_score, multi_gate, patchify

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
    "expert_counts",
    "ffn_cost",
    "group_limited",
    "moe_forward",
    "multi_gate",
    "mutual_information",
    "padding_waste",
    "parameter_count",
    "patchify",
    "permutation",
    "reroute",
    "rotary",
    "route_without",
    "steps_to_reach",
    "swiglu",
    "top_k_routing",
    "upcycle_ffn",
]
