"""Which safetensors files a folder has, and what their headers say is in them."""

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from safetensors import SafetensorError, safe_open

from .._files import read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, as the file's header describes it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Survey:
    """What is in the files of a folder.

    Attributes:
        entries: each tensor by its name, in the order in which the files hold them.
        index: the file of each tensor, as the index has it; empty without an index.
        damaged: names of the files that can't be read.
        wrong: what is wrong with the files, each in a sentence.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    index: dict[str, str] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)


def survey(folder: Path, wanted: set[str] | None = None) -> Survey:
    """Look at the headers of a folder's files, without reading a tensor.

    Args:
        folder: of a checkpoint.
        wanted: names of tensors; files that hold none of them are left alone. None: all files.

    Raises:
        FileNotFoundError, ValueError: as `weight_files` does.
    """
    found = Survey(index=read_index(folder))
    for path in weight_files(folder, wanted):
        try:
            entries = headers(path)
        except ValueError as error:
            found.damaged.add(path.name)
            found.wrong.append(str(error))
            continue
        for name, entry in entries.items():
            if found.index and found.index.get(name) != path.name:
                said = found.index.get(name, "no file for it")
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


def weight_files(folder: Path, wanted: set[str] | None = None) -> list[Path]:
    """The safetensors files of a folder: one, or those that its index names.

    Args:
        folder: of a checkpoint.
        wanted: names of tensors; of the files in an index, only those with one of them are taken.
            Then even shards without their index will do. None: all.

    Raises:
        FileNotFoundError: if one is missing; all that are missing are named.
        ValueError: if the index is damaged, or names something outside the folder.
    """
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    index = read_index(folder)
    if not index:
        shards = sorted(folder.glob(SHARDS)) if wanted is not None else []
        if not shards:
            raise FileNotFoundError(_no_weights(folder))
        return shards
    names = {file for tensor, file in index.items() if wanted is None or tensor in wanted}
    missing = [name for name in sorted(names) if not (folder / name).exists()]
    if missing:
        verb = "does not exist" if len(missing) == 1 else "do not exist"
        raise FileNotFoundError(f"{folder}: {', '.join(missing)} {verb}; see {INDEX}")
    return [folder / name for name in sorted(names)]


def read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor, as the index of a folder has it; empty if no index is needed.

    An index names files of its own folder: a name with a folder in it is refused. Where a link of
    the right name leads is not judged, for Hugging Face's cache is made of links.
    """
    path = folder / INDEX
    if (folder / SINGLE).exists() or not path.exists():
        return {}
    files = read_object(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{path}: weight_map must be an object of tensors and their files")
    outside = [repr(name) for name in sorted(set(files.values())) if not _is_plain(name)]
    if outside:
        raise ValueError(
            f"{path}: weight_map names {', '.join(outside)}: not the name of a safetensors file,"
            " without a folder"
        )
    if not files:
        raise ValueError(f"{path}: weight_map is empty")
    return files


def _is_plain(name: str) -> bool:
    plain = PurePosixPath(name).name == name == PureWindowsPath(name).name
    return plain and name.endswith(".safetensors") and name.isprintable()


def _no_weights(folder: Path) -> str:
    said = f"{folder / SINGLE} does not exist; a checkpoint folder has one"
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not pickles:
        return said
    return f"{said}. {pickles[0]} is not read: it is a pickle, which can run any code"
