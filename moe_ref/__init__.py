"""From one dense feed-forward block to Mixture-of-Experts inference, every step executable.

The rest is imported when asked for: `from moe_ref import training, generation, checkpoints`, and
the rooms of the course, `from moe_ref.course import corpora, exercises, figures, lesson`.
"""

from . import balance, capacity, dispatch, experts, ffn, layer, model, routers, routing, telemetry
from .capacity import Capacity
from .experts import Experts
from .ffn import FeedForward
from .layer import MoELayer
from .model import Transformer, TransformerConfig
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
    "Transformer",
    "TransformerConfig",
    "balance",
    "capacity",
    "dispatch",
    "experts",
    "ffn",
    "layer",
    "model",
    "routers",
    "routing",
    "telemetry",
]
