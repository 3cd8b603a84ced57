"""Read models from the long table that holds them, a row for each field."""

import csv
import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..rotary import Yarn
from .model import Model, Source

KINDS = ("configuration", "paper", "secondary")
Reader = Callable[[str], Any]


def _yes(text: str) -> bool:
    return {"yes": True, "no": False}[text]


def read(path: Path) -> dict[str, Model]:
    """The models of a table, by name, in order of their release.

    Args:
        path: a CSV file with the columns model, field, value, kind and source.

    Raises:
        ValueError: if a row, or a model, is not what it should be: the first one is named.
    """
    values: dict[str, dict[str, Any]] = defaultdict(dict)
    sources: dict[str, dict[str, Source]] = defaultdict(dict)
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            model, field = row["model"], row["field"]
            where = f"line {number} of {path.name}"
            if field not in _READERS:
                raise ValueError(f"{where}: field={field!r} is no field of Model")
            if field in values[model]:
                raise ValueError(f"{where}: {field} of {model!r} was given before")
            if row["kind"] not in KINDS or not row["source"]:
                raise ValueError(f"{where}: kind={row['kind']!r} is not of {KINDS}, or no source")
            try:
                values[model][field] = _READERS[field](row["value"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{where}: {field}={row['value']!r} can't be read") from None
            sources[model][field] = Source(row["kind"], row["source"])
    for model, given in values.items():
        if missing := _REQUIRED - set(given):
            raise ValueError(f"{model!r} lacks {', '.join(sorted(missing))} in {path.name}")
    models = [Model(name=m, sources=sources[m], **given) for m, given in values.items()]
    return {m.name: m for m in sorted(models, key=lambda m: (m.released, m.name))}


def _blocks(text: str) -> tuple[int, ...]:
    """Experts of each block: "0*3 256*58", "(0 64)*32"."""
    if not re.fullmatch(r"(\s*(\d+|\([\d ]+\))(\*\d+)?)+", text):
        raise ValueError
    runs = re.findall(r"(\d+|\([\d ]+\))(?:\*(\d+))?", text)
    return tuple(int(n) for run, times in runs for n in run.strip("()").split() * int(times or 1))


def _windows(text: str) -> tuple[int | None, ...]:
    """Tokens seen, by block: "128 all"."""
    return tuple(None if word == "all" else int(word) for word in text.split())


def _yarn(text: str) -> Yarn:
    """Its arguments: "factor=32 original_length=4096 truncate=no"."""
    given = dict(pair.split("=") for pair in text.split())
    read_each: dict[str, Reader] = {"original_length": int, "truncate": _yes}
    return Yarn(**{name: read_each.get(name, float)(value) for name, value in given.items()})


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split("; "))


_BY_NAME: dict[str, Reader] = {
    "experts": _blocks,
    "windows": _windows,
    "yarn": _yarn,
    "other_lacks": _list,
}
_BY_TYPE: dict[Any, Reader] = {int: int, float: float, bool: _yes, str: str}
_BY_TYPE |= {int | None: int, float | None: float, str | None: str}
_FIELDS = [f for f in dataclasses.fields(Model) if f.name not in ("name", "sources")]
_READERS = {f.name: _BY_NAME.get(f.name) or _BY_TYPE[f.type] for f in _FIELDS}
_REQUIRED = {f.name for f in _FIELDS if f.default is dataclasses.MISSING}
