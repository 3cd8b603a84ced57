"""From one dense feed-forward block to Mixture-of-Experts inference, every step executable.

The classes below are here at once. Every other part, such as `moe_ref.training` or
`moe_ref.checkpoints`, is imported when first asked for; `dir(moe_ref)` lists them all. What only
the notebooks need is in `moe_ref.course`.

The examples in docstrings assume `import torch`, `from moe_ref import *` and the names of their own
module.
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from ._lazy import submodules as _submodules
from .capacity import Capacity
from .config import TransformerConfig
from .experts import Experts
from .ffn import FeedForward
from .layer import MoELayer
from .model import Transformer
from .routers import (
    ExpertChoiceRouter,
    GShardRouter,
    HashRouter,
    NoisyTopKRouter,
    Router,
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
    "Router",
    "Routing",
    "SwitchRouter",
    "TopKRouter",
    "Transformer",
    "TransformerConfig",
]

__getattr__, __dir__ = _submodules(__name__)

try:
    __version__ = _version("moe_ref")
except _PackageNotFoundError:  # read from a source tree that was never installed
    __version__ = "unknown"
