"""Parts of a package that are imported when first asked for, and cost nothing before."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def submodules(
    package: str, **elsewhere: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package that offers every public module in it.

    Args:
        package: its `__name__`.
        elsewhere: further names, each with the module it stands for, relative to the package.
    """
    folder = Path(sys.modules[package].__path__[0])

    def places() -> dict[str, str]:
        found = [*folder.glob("[a-z]*.py"), *(p.parent for p in folder.glob("[a-z]*/__init__.py"))]
        return {path.stem: f".{path.stem}" for path in found} | elsewhere

    def get(name: str) -> Any:
        if not name.startswith("_") and (place := places().get(name)):
            return importlib.import_module(place, package)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted({*vars(sys.modules[package]), *places()})
