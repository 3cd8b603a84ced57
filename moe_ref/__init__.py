"""From one dense feed-forward block to Mixture-of-Experts inference, every step executable.

The side rooms are imported when asked for: `from moe_ref import corpora, figures, lesson, checks`.
"""

from . import dispatch, experts, ffn, layer, routers, routing
from .experts import Experts
from .ffn import FeedForward
from .layer import MoELayer
from .routers import TopKRouter
from .routing import Routing

__all__ = [
    "Experts",
    "FeedForward",
    "MoELayer",
    "Routing",
    "TopKRouter",
    "dispatch",
    "experts",
    "ffn",
    "layer",
    "routers",
    "routing",
]
