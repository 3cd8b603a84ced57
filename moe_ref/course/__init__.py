"""What only the notebooks need: their set-up, figures, text and exercises.

from moe_ref.course import corpora, exercises, figures, lesson
"""

import importlib
from typing import Any

_MODULES = {
    "corpora": ".text.corpora",
    "exercises": ".exercises",
    "figures": ".figures",
    "lesson": ".lesson",
}


def __getattr__(name: str) -> Any:
    """Import a part of the course when it is first asked for: figures are slow to load."""
    if name in _MODULES:
        return importlib.import_module(_MODULES[name], __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
