"""Reading a folder's tensors straight into a model: all are checked before the first is read."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .family import HEAD, Coded, Layout, Place
from .folder import Entry, Survey, survey

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {"I8": torch.int8}  # of quantised weights
CHUNK = 16 << 20  # bytes read at a time, so that a conversion needs no copy of a large tensor
MAPPED = 32 << 20  # bytes read, at least, before files are opened anew
LISTED = 50  # faults that one message names


@dataclass(frozen=True)
class Source:
    """What fills a place: a tensor of a file, or the tensors that hold it coded.

    Attributes:
        place: what it fills.
        entries: the tensors.
        shape, dtype: of the tensor, once it is decoded.
        coded: how it is decoded; None: it is as it should be.

    Example:
        >>> entry = Entry(Path("model.safetensors"), "model.norm.weight", (16,), "BF16")
        >>> Source(Place("norm.weight"), (entry,), (16,), torch.bfloat16, None).place.ours
        'norm.weight'
    """

    place: Place
    entries: tuple[Entry, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    coded: Coded | None


def read_into(
    module: nn.Module,
    layout: Layout,
    folder: Path,
    *,
    whole: Layout | None = None,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> None:
    """Give a module memory, and fill it from the files of a folder.

    Args:
        module: is on the meta device.
        layout: the places to fill: all of its parameters and buffers.
        folder: of a checkpoint.
        whole: the layout of the whole model, if that is more: files that only hold tensors of the
            rest are not opened. None: all files are read.
        device, dtype: as in `checkpoints.load`.

    Raises:
        FileNotFoundError: if the files are missing.
        ValueError: if anything is wrong with them; all that is wrong is named.
    """
    empty = module.state_dict(keep_vars=True)
    wanted = {name for tensor, place in layout.items() for name in spellings(tensor, place)}
    found = survey(folder, wanted if whole is not None else None)
    names = {
        name for tensor, place in (whole or layout).items() for name in spellings(tensor, place)
    }
    known = names | {HEAD}  # a tied model's file may repeat the embedding as its head
    sources = matched(layout, empty, found, folder, known)
    allocate(module, dtypes(sources) if dtype is None else defaultdict(lambda: dtype), device)
    with progress(sources, folder.name) as advance:
        fill(module.state_dict(), sources, advance)


def spellings(name: str, place: Place) -> list[str]:
    """The names by which a file may hold what fills a place: its own, and those of coded parts."""
    return [name, *(name + ending for ending in (place.coded.endings if place.coded else ()))]


def matched(
    layout: Layout, empty: Mapping[str, Tensor], found: Survey, folder: Path, known: set[str]
) -> list[Source]:
    """What fills each place, in the order of the files; see `read_into`."""
    sources, wrong = [], list(found.wrong)
    for name, place in layout.items():
        names = spellings(name, place)
        if name in found.entries or not any(part in found.entries for part in names):
            names = names[:1]
        else:
            names = names[1:]
        absent = [part for part in names if part not in found.entries]
        # What a damaged file would have held is not called missing.
        wrong += [f"{part} is missing" for part in absent if not _is_damaged(part, found)]
        if not absent:
            entries = tuple(found.entries[part] for part in names)
            sources.append(_source(place, entries, place.coded if names[0] != name else None))
            wrong += _misfits(name, sources[-1], empty)
    wrong += [
        f"{name} is not a tensor of this model" for name in found.entries if name not in known
    ]
    filled = {id(empty[place.ours]) for place in layout.values()}
    wrong += [f"{name} is not in this format" for name in empty if id(empty[name]) not in filled]
    if wrong:
        more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise ValueError(f"{folder}: {'; '.join(wrong[:LISTED])}{more}")
    order = {name: position for position, name in enumerate(found.entries)}
    return sorted(sources, key=lambda source: order[source.entries[0].name])


def _is_damaged(name: str, found: Survey) -> bool:
    """Whether a tensor may be in a file that can't be read."""
    return found.index.get(name) in found.damaged if found.index else bool(found.damaged)


def _source(place: Place, entries: tuple[Entry, ...], coded: Coded | None) -> Source:
    if coded is None:
        dtype = (FLOATS | CODES).get(entries[0].dtype, torch.bool)
        return Source(place, entries, entries[0].shape, dtype, None)
    none = coded.decode(*(Files(0).rows(entry, 0, 0) for entry in entries))
    return Source(place, entries, (*entries[0].shape[:1], *none.shape[1:]), none.dtype, coded)


def _misfits(name: str, source: Source, empty: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with a tensor, each in a sentence."""
    wrong, expected = [], source.place.shape_in(empty)
    if source.shape != expected:
        wrong.append(f"{name} is {list(source.shape)}, not {list(expected)}")
    right = FLOATS if empty[source.place.ours].is_floating_point() else CODES
    if source.dtype not in right.values():
        wrong.append(f"{name} is {source.entries[0].dtype}, not one of {', '.join(right)}")
    heights = [entry.shape[0] for entry in source.entries[1:]]
    if any(height != source.shape[0] for height in heights):
        wrong.append(f"{name} is coded in parts of {source.shape[0]} and {heights} rows")
    return wrong


def dtypes(sources: Iterable[Source]) -> Mapping[str, torch.dtype]:
    """The dtype of each parameter: that of most numbers, but a router keeps its own."""
    numbers: Counter[torch.dtype] = Counter()
    own: dict[str, torch.dtype] = {}
    for source in sources:
        if not source.dtype.is_floating_point:
            continue
        ours = source.place.ours
        numbers[source.dtype] += math.prod(source.shape)
        if "router" in ours.split("."):
            own[ours] = torch.promote_types(own.get(ours, source.dtype), source.dtype)
    most = numbers.most_common(1)[0][0]
    return defaultdict(lambda: most, own)


def allocate(
    module: nn.Module, dtypes: Mapping[str, torch.dtype], device: torch.device | str
) -> None:
    """Memory for the tensors of a module on the meta device; what is tied stays tied.

    Buffers keep their dtype: a router's bias is float32 whatever the rest is.
    """
    new: dict[int, nn.Parameter] = {}
    for prefix, part in module.named_modules():
        for name, old in list(part.named_parameters(recurse=False)):
            if id(old) not in new:
                dtype = dtypes[f"{prefix}.{name}".lstrip(".")]
                tensor = torch.empty_like(old, device=device, dtype=dtype)
                new[id(old)] = nn.Parameter(tensor, old.requires_grad)
            setattr(part, name, new[id(old)])
        for name, old in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty_like(old, device=device))


def fill(
    tensors: Mapping[str, Tensor], sources: list[Source], progress: Callable[[int], object]
) -> None:
    """Copy what the files hold into the model, some rows at a time.

    Args:
        tensors: the model's.
        sources: what fills them.
        progress: is called with the number of numbers read.
    """
    files = Files(max(MAPPED, sum(tensor.nbytes for tensor in tensors.values()) // 20))
    for source in sources:
        part, shape = source.place.of(tensors), source.shape or (1,)
        whole = part.shape[:1] != shape[:1]  # the view has no rows in common with the file
        step = CHUNK // max(1, math.prod(shape[1:]) * source.dtype.itemsize)
        step = shape[0] if whole else max(1, step)
        for first in range(0, shape[0], max(1, step)):
            pieces = [files.rows(entry, first, first + step) for entry in source.entries]
            rows = pieces[0] if source.coded is None else source.coded.decode(*pieces)
            target = part if whole else part[first : first + step]
            target.copy_(rows.reshape(target.shape))
            progress(sum(piece.numel() for piece in pieces))


class Files:
    """Open safetensors files, which are mapped: pages that were read stay in memory until closed.

    Args:
        limit: bytes read until all files are opened anew.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as name:
        ...     path = Path(name, "model.safetensors")
        ...     save_file({"w": torch.arange(6).view(3, 2)}, path)
        ...     Files(limit=1000).rows(Entry(path, "w", (3, 2), "I64"), 1, 3).tolist()
        [[2, 3], [4, 5]]
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._read = limit, 0
        self._open: dict[Path, Any] = {}

    def rows(self, entry: Entry, first: int, last: int) -> Tensor:
        """Some rows of a tensor, along its first axis; of a tensor without axes, all of it."""
        if self._read > self._limit:
            self._open.clear()
            self._read = 0
        if entry.path not in self._open:
            self._open[entry.path] = safe_open(entry.path, "pt")
        file = self._open[entry.path]
        rows = (
            file.get_slice(entry.name)[first:last] if entry.shape else file.get_tensor(entry.name)
        )
        self._read += rows.nbytes
        return rows


@contextmanager
def progress(sources: Iterable[Source], title: str) -> Iterator[Callable[[int], object]]:
    """A bar that appears after a few seconds, if tqdm is there; to be called with what was read."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield lambda numbers: None
        return
    total = sum(math.prod(entry.shape) for source in sources for entry in source.entries)
    with tqdm(total=total, desc=title, unit=" weights", unit_scale=True, delay=3) as bar:
        yield bar.update
