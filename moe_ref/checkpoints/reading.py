"""Safetensors files, read straight into a model: they are checked first, then read row by row.

`survey` opens the files that hold what is wanted and looks at their headers; `matched` compares
these with the places in the model, and names all that is wrong at once; `fill` reads.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._files import read_object
from .family import Coded, Layout, Place

INDEX, SINGLE, SHARDS = "model.safetensors.index.json", "model.safetensors", "model-*.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 16 << 20  # bytes read at a time: a tensor of any size is converted in so little memory
MAPPED = 64 << 20  # bytes after which files are opened anew: until then, pages read stay in memory
LISTED = 50  # what is wrong, in one message


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, as the file's header describes it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Source:
    """What fills a place: a tensor of a file, or the coded form of one."""

    place: Place
    entries: tuple[Entry, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    coded: Coded | None


@dataclass(frozen=True)
class Survey:
    """What is in the files of a folder.

    Attributes:
        entries: each tensor, in the order in which the files hold them.
        index: the file of each tensor, as the index has it; empty without one.
        wrong: what is wrong with files and index.
        damaged: names of files that can't be read.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    index: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)


def weight_files(folder: Path, wanted: set[str] | None = None) -> list[Path]:
    """The safetensors files of a folder that are to be read: one, or those that its index names.

    Args:
        folder: of a checkpoint.
        wanted: names of tensors; of the files of an index, only those with one of them are taken.
            None: all.

    Raises:
        FileNotFoundError: if one is missing.
        ValueError: if the index is damaged, or names what is not a file of this folder.
    """
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    index = read_index(folder)
    if not index:
        shards = sorted(folder.glob(SHARDS))
        if shards and wanted is not None:
            return shards
        raise FileNotFoundError(_no_weights(folder))
    names = {file for tensor, file in index.items() if wanted is None or tensor in wanted}
    missing = [str(folder / name) for name in sorted(names) if not (folder / name).exists()]
    if missing:
        verb = "does not exist" if len(missing) == 1 else "do not exist"
        raise FileNotFoundError(f"{', '.join(missing)} {verb}; {folder / INDEX} names them")
    return [folder / name for name in sorted(names)]


def read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor, as the index of a folder has it; empty if there is no index.

    A file must be one of the folder: its name may have no folder in it. Where a link of that name
    leads is up to whoever made the folder: Hugging Face's cache consists of such links.
    """
    path = folder / INDEX
    if (folder / SINGLE).exists() or not path.exists():
        return {}
    files = read_object(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{path}: weight_map must be an object of tensors and their files")
    outside = sorted({name for name in files.values() if not _is_plain(name)})
    if outside:
        raise ValueError(
            f"{path}: weight_map must name safetensors files of this folder, not"
            f" {', '.join(map(repr, outside))}"
        )
    return files


def _is_plain(name: str) -> bool:
    plain = PurePosixPath(name).name == name == PureWindowsPath(name).name
    return plain and name.endswith(".safetensors") and "\0" not in name


def _no_weights(folder: Path) -> str:
    pickles = sorted(
        p.name for end in ("bin", "pt", "pth", "ckpt") for p in folder.glob(f"*.{end}")
    )
    if not pickles:
        return f"{folder / SINGLE} does not exist; a checkpoint folder has one"
    return (
        f"{folder / SINGLE} does not exist, and {pickles[0]} is not read: it is a pickle, which can"
        " run any code. Have its owner, or a sandbox, save it as safetensors"
    )


def survey(folder: Path, wanted: set[str] | None = None) -> Survey:
    """Look at the headers of the files, and at their index, without reading a tensor.

    Args:
        folder: of a checkpoint.
        wanted: names of tensors; files that hold none of them are left alone. None: all files.
    """
    found = Survey(index=read_index(folder))
    for path in weight_files(folder, wanted):
        try:
            entries = headers(path)
        except ValueError as error:
            found.wrong.append(str(error))
            found.damaged.add(path.name)
            continue
        for name, entry in entries.items():
            if found.index and found.index.get(name) != path.name:
                said = found.index.get(name, "no file")
                found.wrong.append(f"{name} is in {path.name}, but {INDEX} names {said}")
            elif name in found.entries:
                found.wrong.append(f"{name} is in {found.entries[name].path.name} and {path.name}")
            found.entries.setdefault(name, entry)
    return found


def headers(path: Path) -> dict[str, Entry]:
    """The tensors of a file, in its order; ValueError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.offset_keys()}
            return {
                name: Entry(path, name, tuple(part.get_shape()), part.get_dtype())
                for name, part in parts.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def spellings(name: str, place: Place) -> list[str]:
    """The names by which files may hold what fills a place."""
    return [name, *(name + ending for ending in (place.coded.endings if place.coded else ()))]


def matched(
    layout: Layout, tensors: Mapping[str, Tensor], found: Survey, known: set[str]
) -> dict[str, Source]:
    """What fills each place, in the order of the files.

    Args:
        layout: the places to fill.
        tensors: the model's, on the meta device.
        found: what the files hold.
        known: names that files may hold besides, and that are not read.

    Raises:
        ValueError: if a tensor is missing, unknown, of another shape, or not of floating-point
            numbers, or a file is damaged; all of them are named.
    """
    sources, wrong = {}, list(found.wrong)
    for name, place in layout.items():
        names = spellings(name, place)
        coded = place.coded if name not in found.entries else None
        entries = [
            found.entries[n] for n in (names[1:] if coded else names[:1]) if n in found.entries
        ]
        if len(entries) < (len(names) - 1 if coded else 1):
            if not found.damaged or found.index.get(name) not in {None, *found.damaged}:
                wrong.append(f"{name} is missing")
            continue
        shape, dtype = entries[0].shape, FLOATS.get(entries[0].dtype)
        if coded:
            none = coded.decode(*(Files().rows(entry, 0, 0) for entry in entries))
            shape, dtype = (*shape[:1], *none.shape[1:]), none.dtype
        expected = place.shape_in(tensors)
        if shape != expected:
            wrong.append(f"{name} is {list(shape)}, not {list(expected)}")
        elif dtype is None:
            wrong.append(f"{name} is {entries[0].dtype}, not of floating-point numbers")
        else:
            sources[name] = Source(place, tuple(entries), shape, dtype, coded)
    wrong += [f"{n} is not a tensor of this model" for n in found.entries if n not in known]
    if wrong:
        more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise ValueError("; ".join(wrong[:LISTED]) + more)
    order = {name: position for position, name in enumerate(found.entries)}
    return dict(sorted(sources.items(), key=lambda item: order[item[1].entries[0].name]))


class Files:
    """Open safetensors files; they are opened anew now and then, to let go of the pages read."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}
        self._mapped = 0

    def rows(self, entry: Entry, first: int, last: int) -> Tensor:
        """Some rows of a tensor, along its first axis; of a number, the number itself."""
        if self._mapped > MAPPED:
            self._open.clear()
            self._mapped = 0
        if entry.path not in self._open:
            self._open[entry.path] = safe_open(entry.path, "pt")
        file = self._open[entry.path]
        # A slice of a tensor without axes is an error.
        rows = file.get_slice(entry.name)[first:last] if entry.shape else None
        rows = file.get_tensor(entry.name) if rows is None else rows
        self._mapped += rows.nbytes
        return rows


def fill(
    tensors: Mapping[str, Tensor], sources: Iterable[Source], progress: Callable[[int], object]
) -> None:
    """Copy what the files hold into the model, a few rows at a time.

    Args:
        tensors: the model's.
        sources: from `matched`.
        progress: is called with the number of bytes read.
    """
    files = Files()
    for source in sources:
        part = source.place.of(tensors)
        shape = source.shape
        whole = not shape or part.shape[:1] != shape[:1]
        height = shape[0] if shape else 1
        size = prod(shape) * source.dtype.itemsize
        step = height if whole else max(1, CHUNK * height // max(1, size))
        for first in range(0, height, max(1, step)):
            pieces = [files.rows(entry, first, first + step) for entry in source.entries]
            rows = source.coded.decode(*pieces) if source.coded else pieces[0]
            target = part if whole else part[first : first + step]
            target.copy_(rows.reshape(target.shape))
            progress(sum(piece.nbytes for piece in pieces))


@contextmanager
def progress(sources: Iterable[Source], title: str) -> Iterator[Callable[[int], object]]:
    """A bar for the bytes of the sources, shown after a few seconds and only if tqdm is there."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield lambda read: None
        return
    total = sum(prod(entry.shape) for source in sources for entry in source.entries)
    with tqdm(total=total, desc=title, unit=" numbers", unit_scale=True, delay=3) as bar:
        yield bar.update
