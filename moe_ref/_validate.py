"""One-line errors for impossible sizes and unknown names."""

import difflib
import operator
from collections.abc import Iterable, Mapping
from typing import TypeVar

Thing = TypeVar("Thing")


def check_sizes(**sizes: int) -> None:
    """Raise a ValueError that names the first size that is not a whole number or is below 1."""
    for name, size in sizes.items():
        try:
            whole = operator.index(size)
        except TypeError:
            raise ValueError(f"{name}={size!r} must be a whole number") from None
        if whole < 1:
            raise ValueError(f"{name}={size} must be at least 1")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise a ValueError that lists the choices unless `value` is one of them."""
    known = list(choices)
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = f"neither {' nor '.join(known)}" if len(known) == 2 else f"none of {', '.join(known)}"
    raise ValueError(f"{name}={value!r} is {listed}{hint}")


class Named(dict[str, Thing]):
    """Things by name; of an unknown name the error names the nearest.

    Args:
        what: the things are, in a word.
        things: by name.

    Example:
        >>> Named("animal", {"horse": 1, "goose": 2})["hors"]
        Traceback (most recent call last):
        KeyError: "animal='hors' is neither horse nor goose; did you mean 'horse'?"
    """

    def __init__(self, what: str, things: Mapping[str, Thing]) -> None:
        super().__init__(things)
        self.what = what

    def __missing__(self, name: str) -> Thing:
        try:
            check_choice(self.what, name, self)
        except ValueError as error:
            raise KeyError(str(error)) from None
        raise KeyError(name)
