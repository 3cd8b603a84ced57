"""Where the files of `data/` are, in a clone or in an installed package, which has only a few."""

from pathlib import Path

# What no package brings, by the beginning of its name, and how to get it.
_CLONED = {
    "tiny-": "a trained model: clone the repository, whose data/ holds it, or train it in the clone"
    " with `python scripts/tiny.py`",
    "measurements": "what trainings of the course measured: clone the repository, whose data/"
    " holds it",
}
_OTHERS = "of the course, but for a typing error: install moe_ref again, or clone the repository"


def data_file(name: str) -> Path:
    """Where a file or folder of `data/` is: in the package, or beside it in a clone.

    Raises FileNotFoundError that says what is missing and how to get it.
    """
    package = Path(__file__).resolve().parent
    for place in (package / "data", package.parent / "data"):
        if (place / name).exists():
            return place / name
    about = next((text for start, text in _CLONED.items() if name.startswith(start)), _OTHERS)
    raise FileNotFoundError(
        f"data file {name!r} is neither in {package / 'data'} nor in {package.parent / 'data'}."
        f" It is {about}"
    )
