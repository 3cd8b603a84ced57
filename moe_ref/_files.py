"""Reading and writing tensors, text and JSON; a file is written whole or not at all."""

import json
import os
from collections.abc import Callable, Mapping
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
    write_all({path: lambda partial: save_file(tensors, partial, metadata)})


def write_text(text: str, path: Path) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    write_all({path: lambda partial: partial.write_bytes(text.encode("utf-8"))})


def write_all(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files, all of them whole, or none.

    Args:
        writers: for each file, what writes it to the path that it is given.

    Raises:
        OSError: if one can't be written; those there before are left as they were.
    """
    partials = {path: path.with_name(path.name + ".partial") for path in writers}
    path = Path()
    try:
        for path, write in writers.items():
            write(partials[path])
            with partials[path].open("rb+") as file:
                os.fsync(file.fileno())  # the bytes before the name, even in a power cut
        for path, partial in partials.items():
            os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {path}: {error}; what was there is as it was") from error
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
