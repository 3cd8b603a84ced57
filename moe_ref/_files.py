"""Reading and writing tensors, text and JSON; a file is written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; ValueError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; if there is none, a ValueError that names the file and place."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8: each says where
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object, {{...}}, not a {type(found).__name__}")
    return found


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    with _replacing(path) as partial:
        save_file(tensors, partial, metadata)


def write_text(text: str, path: Path) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with _replacing(path) as partial:
        partial.write_bytes(text.encode("utf-8"))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to; the file takes the place of `path` once it is whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # the bytes before the name, even in a power cut
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {path}: {error}; what was there is as it was") from error
    finally:
        partial.unlink(missing_ok=True)
