"""From one dense feed-forward block to Mixture-of-Experts inference, every step executable.

The side rooms are imported when asked for: `from moe_ref import corpora, figures, lesson, checks`.
"""

from . import balance, capacity, dispatch, experts, ffn, layer, routers, routing, telemetry
from .capacity import Capacity
from .experts import Experts
from .ffn import FeedForward
from .layer import MoELayer
from .routers import (
    ExpertChoiceRouter,
    GShardRouter,
    HashRouter,
    NoisyTopKRouter,
    SwitchRouter,
    TopKRouter,
)
from .routing import Routing

__all__ = [
    "Capacity",
    "ExpertChoiceRouter",
    "Experts",
    "FeedForward",
    "GShardRouter",
    "HashRouter",
    "MoELayer",
    "NoisyTopKRouter",
    "Routing",
    "SwitchRouter",
    "TopKRouter",
    "balance",
    "capacity",
    "dispatch",
    "experts",
    "ffn",
    "layer",
    "routers",
    "routing",
    "telemetry",
]
