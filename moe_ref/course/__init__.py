"""What only the notebooks need: their set-up, figures, text and exercises.

from moe_ref.course import corpora, exercises, figures, lesson
"""

from .._lazy import submodules as _submodules

# On first use: figures are slow to load.
__getattr__, __dir__ = _submodules(__name__, corpora=".text.corpora")
