"""Writing a model's tensors to one safetensors file, or to several and their index."""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .._files import write_all
from .family import Layout, Place
from .folder import INDEX, SINGLE, read_index


def write_model(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    folder: Path,
    dtype: torch.dtype | None,
    shard_size: int | None,
    texts: Mapping[str, str],
) -> None:
    """Write the tensors and texts of a model, all or, if one can't be written, none.

    Args:
        tensors: the model's.
        layout: the place of each tensor of a file.
        folder: exists; other weights in it, of one file or of several, are deleted.
        dtype, shard_size: as in `checkpoints.save`.
        texts: further files, by their names.

    Raises:
        OSError: if a file can't be written; those there before are left as they were.
    """
    shards, total = split(tensors, layout, dtype, shard_size)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    else:
        files = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": files}
        texts = {**texts, INDEX: json.dumps(index, indent=2) + "\n"}
    try:
        before = {SINGLE, INDEX, *read_index(folder).values()}
    except ValueError:  # a damaged index goes too; nobody knows what it meant
        before = {SINGLE, INDEX}
    writers: dict[Path, Callable[[Path], object]] = {}
    for file, shard in zip(names, shards, strict=True):
        writers[folder / file] = partial(_write_shard, tensors, shard, dtype)
    for file, text in texts.items():
        writers[folder / file] = partial(Path.write_bytes, data=text.encode("utf-8"))
    write_all(writers)
    for file in before - {path.name for path in writers}:
        (folder / file).unlink(missing_ok=True)


def split(
    tensors: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype | None, size: int | None
) -> tuple[list[Layout], int]:
    """The tensors of each file, at most `size` bytes of them, and the number of bytes of all."""
    shards: list[Layout] = [{}]
    used = total = 0
    for name, place in layout.items():
        kind = _dtype(tensors[place.ours], dtype)
        nbytes = math.prod(place.shape_in(tensors)) * kind.itemsize
        if size is not None and shards[-1] and used + nbytes > size:
            shards.append({})
            used = 0
        shards[-1][name] = place
        used, total = used + nbytes, total + nbytes
    return shards, total


def _write_shard(
    tensors: Mapping[str, Tensor], shard: Layout, dtype: torch.dtype | None, path: Path
) -> None:
    stored = {name: _stored(tensors, place, dtype) for name, place in shard.items()}
    save_file(stored, path, {"format": "pt"})


def _stored(tensors: Mapping[str, Tensor], place: Place, dtype: torch.dtype | None) -> Tensor:
    """A tensor as it is in a file: a copy of its own, since a file takes no two views of one."""
    part = place.of(tensors).reshape(place.shape_in(tensors))
    return part.to("cpu", _dtype(part, dtype), copy=True).contiguous()


def _dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Of a tensor in the file: codes of quantised weights stay what they are."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
