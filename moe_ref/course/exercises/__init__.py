"""The exercise checks of the course, one file for each notebook.

A check takes the reader's function or guess. A function is tried on small cases first (ties, idle
experts, one token, every expert chosen), and the first case it gets wrong is shown.
"""

from .nb00 import expert_counts, gate_weights, idle_experts
from .nb01 import backward_work, balance_tokens, swiglu
from .nb02 import mixtral_8x22b, moe_forward, top_k_routing
from .nb03 import expert_choice_padded, group_limited, switch_layer
from .nb04 import combine, cost_of_moving, permutation
from .nb05 import drop_overflow, fair_drop, reroute
from .nb06 import balance_loss, biased_top_k, idle_updates
from .nb07 import fold, rotary, upcycle_ffn
from .nb08 import accidental_bits, renumber, route_around
from .nb09 import admit_by_score, assemble, images_left_out
from .nb10 import count_parameters, moe_settings, share_of_experts
from .nb11 import bandwidth, nine_in_ten, touched_by_two

__all__ = [
    "accidental_bits",
    "admit_by_score",
    "assemble",
    "backward_work",
    "balance_loss",
    "balance_tokens",
    "bandwidth",
    "biased_top_k",
    "combine",
    "cost_of_moving",
    "count_parameters",
    "drop_overflow",
    "expert_choice_padded",
    "expert_counts",
    "fair_drop",
    "fold",
    "gate_weights",
    "group_limited",
    "idle_experts",
    "idle_updates",
    "images_left_out",
    "mixtral_8x22b",
    "moe_forward",
    "moe_settings",
    "nine_in_ten",
    "permutation",
    "renumber",
    "reroute",
    "rotary",
    "route_around",
    "share_of_experts",
    "swiglu",
    "switch_layer",
    "top_k_routing",
    "touched_by_two",
    "upcycle_ffn",
]
