"""Where experts lie while they are not in a slot: in safetensors files, or in host memory."""

import io
import json
import math
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..checkpoints.family import Place
from ..checkpoints.folder import Entry
from ..checkpoints.reading import FLOATS, Source
from ..experts import Experts
from .policy import Key

DTYPES = {**FLOATS, "U8": torch.uint8, "I8": torch.int8}


@runtime_checkable
class Shelf(Protocol):
    """Anything that experts can be fetched from."""

    read_bytes: int  # of one expert

    def fetch(self, key: Key, slot: Experts) -> None:
        """Copy an expert to a slot, an `Experts` of one; OSError if it can't be read."""


class Host:
    """Experts in host memory, page-locked if they go to a GPU.

    Args:
        layers: the experts of each layer.
        device: of the slots.

    Example:
        >>> experts, slot = Experts(3, d_model=4, d_ff=8), Experts(1, d_model=4, d_ff=8)
        >>> Host([experts], "cpu").fetch((0, 2), slot)
        >>> torch.equal(slot.down[0], experts.down[2])
        True
    """

    def __init__(self, layers: Iterable[Experts], device: torch.device | str) -> None:
        pin = torch.device(device).type == "cuda"
        self._layers = [
            {name: w.detach().pin_memory() if pin else w.detach() for name, w in part}
            for part in (layer.named_parameters() for layer in layers)
        ]
        self.read_bytes = sum(w[0].nbytes for w in self._layers[0].values())

    def fetch(self, key: Key, slot: Experts) -> None:
        layer, expert = key
        for name, weight in slot.named_parameters():
            weight.detach()[0].copy_(self._layers[layer][name][expert])


class Reader:
    """Plain reads of safetensors files, which stay open: a file that is deleted can still be read.

    They are not mapped: mapped pages would count as this process's memory, and a damaged disk or
    a file cut short would end the process instead of raising an error.

    Args:
        paths: of the files.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as name:
        ...     path = Path(name, "model.safetensors")
        ...     save_file({"w": torch.arange(6.0).view(3, 2)}, path)
        ...     Reader([path]).rows(Entry(path, "w", (3, 2), "F32"), 1, 3).tolist()
        [[2.0, 3.0], [4.0, 5.0]]
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files: dict[Path, io.FileIO] = {}
        self._starts: dict[tuple[Path, str], int] = {}
        self._lock = threading.Lock()
        for path in dict.fromkeys(paths):
            file = self._files[path] = io.FileIO(path)
            weakref.finalize(self, file.close)
            length = int.from_bytes(file.read(8), "little")
            for name, about in json.loads(file.read(length)).items():
                if name != "__metadata__":
                    self._starts[path, name] = 8 + length + about["data_offsets"][0]

    def rows(self, entry: Entry, first: int = 0, last: int | None = None) -> Tensor:
        """Some rows of a tensor, along its first axis, in memory of their own."""
        shape = entry.shape
        if shape:
            shape = (len(range(*slice(first, last).indices(shape[0]))), *shape[1:])
        rows = torch.empty(shape, dtype=DTYPES[entry.dtype])
        self.read(entry, first, rows)
        return rows

    def read(self, entry: Entry, first: int, target: Tensor) -> None:
        """Read a tensor from row `first` on, as many bytes as the target has.

        Raises:
            OSError: if the file ends before, or can't be read.
        """
        start = self._starts[entry.path, entry.name]
        start += first * math.prod(entry.shape[1:]) * target.itemsize
        room = memoryview(target.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        file = self._files[entry.path]
        with self._lock:
            file.seek(start)
            while room:
                count = file.readinto(room)
                if not count:
                    raise OSError(f"{entry.path} ends before the last byte of {entry.name}")
                room = room[count:]

    def fill(self, source: Source, target: Tensor, first: int = 0, last: int | None = None) -> None:
        """Fill a tensor of a model with rows of a file, decoded if need be."""
        same = source.dtype == target.dtype and source.shape[1:] == target.shape[1:]
        plain = source.coded is None and target.device.type == "cpu" and target.is_contiguous()
        if same and plain and target.numel():
            self.read(source.entries[0], first, target)
            return
        pieces = [self.rows(entry, first, last) for entry in source.entries]
        rows = pieces[0] if source.coded is None else source.coded.decode(*pieces)
        target.copy_(rows.reshape(target.shape))


@dataclass(frozen=True)
class _Part:
    """Rows of a file, and where they belong in an `Experts` of one."""

    source: Source
    place: Place
    first: int = 0
    last: int | None = None


class Shards:
    """Experts in the safetensors files of a checkpoint, one tensor for each, or all in one.

    Args:
        reader: of the files.
        sources: what fills the experts' places.
        layers: of the part of a model with experts, its name and how many it has.

    Example:
        >>> entry = Entry(Path("model.safetensors"), "experts.down", (3, 4, 8), "F32")
        >>> source = Source(Place("experts.down"), (entry,), (3, 4, 8), torch.float32, None)
        >>> Shards(Reader([]), [source], {"experts": 3}).read_bytes
        128
    """

    def __init__(
        self, reader: Reader, sources: Iterable[Source], layers: Mapping[str, int]
    ) -> None:
        self._reader = reader
        self._parts: dict[Key, list[_Part]] = {}
        number = {name: i for i, name in enumerate(layers)}
        for source in sources:
            layer, _, name = source.place.ours.rpartition(".")
            index = source.place.index
            index = index if isinstance(index, tuple) else (index,)
            for e in index[:1] or range(layers[layer]):
                place = replace(source.place, ours=name, index=(0, *index[1:]) if index else ())
                part = _Part(source, place, *(() if index else (e, e + 1)))
                self._parts.setdefault((number[layer], e), []).append(part)
        self.read_bytes = sum(map(_size, self._parts[0, 0]))

    def fetch(self, key: Key, slot: Experts) -> None:
        tensors = dict(slot.named_parameters())
        for part in self._parts[key]:
            try:
                self._reader.fill(part.source, part.place.of(tensors), part.first, part.last)
            except OSError as error:
                raise OSError(f"expert {key[1]} of MoE layer {key[0]}: {error}") from error


def _size(part: _Part) -> int:
    """Bytes in the file."""
    whole = sum(
        math.prod(entry.shape) * DTYPES[entry.dtype].itemsize for entry in part.source.entries
    )
    return whole if part.last is None else whole // part.source.shape[0]
