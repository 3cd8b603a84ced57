"""Every plot and drawing of the course. The only package that imports matplotlib.

Each function draws one kind of figure and shows it. `title` says what is found. A figure is shown
as a `Figure`: a picture, and its title and data in words, which tests compare and screen readers
read. All of them read in grey and for the colour-blind: what colour tells is told a second time by
a marker, a hatch, a number or a place. The ground is white, in a dark theme too.
"""

from .charts import bars, lines, roofline, stack
from .decisions import permutation, routing, text
from .figure import Figure
from .flows import feedback_loop, router_pipeline
from .grid import matrix
from .history import history, traits
from .movement import capacity, dispatch_forms
from .reading import decode_step
from .released import pr_moe, tensor_file
from .structures import ffn, moe_layer, transformer_block
from .variants import mmoe, patches, upcycling

__all__ = [
    "Figure",
    "bars",
    "capacity",
    "decode_step",
    "dispatch_forms",
    "feedback_loop",
    "ffn",
    "history",
    "lines",
    "matrix",
    "mmoe",
    "moe_layer",
    "patches",
    "permutation",
    "pr_moe",
    "roofline",
    "router_pipeline",
    "routing",
    "stack",
    "tensor_file",
    "text",
    "traits",
    "transformer_block",
    "upcycling",
]
