"""Checkpoints in Hugging Face's formats: safetensors files beside a config.json.

`save` writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` reads; `load` reads
such a folder, even if the weights are in several files. A module of this package with the functions
of `family.Family` is a family of formats; a line in `FAMILIES` makes it known.
"""

import inspect
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import read_object, write_tensors, write_text
from ..model import Transformer, TransformerConfig
from ..routers import TopKRouter
from . import mixtral
from .family import HEAD, Family, Layout, read
from .reading import Source, fill, matched, progress, spellings, survey
from .reading import weight_files as weight_files

# By the model_type of config.json. `save` takes the first family that can hold the model.
FAMILIES: dict[str, Family] = {"mixtral": mixtral, "mistral": mixtral}

# What `Transformer` lacks, by the model_type of other formats.
UNSUPPORTED = {
    "deepseek_v2": "multi-head latent attention",
    "deepseek_v3": "multi-head latent attention",
}

TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<|pad|>",
    "eos_token": "<|endoftext|>",
}


def save(
    model: Transformer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
) -> None:
    """Write config.json and model.safetensors, and tokenizer.json if one is given.

    Args:
        model: all of its blocks MoE, as in Mixtral, or none, as in Mistral.
        folder: is made if missing.
        dtype: of the file; None: that of the model.
        tokenizer: a tokenizer.json to put beside the weights, for transformers' AutoTokenizer;
            None: no tokenizer.

    Raises:
        ValueError: if the model has something that no format here can hold.
        OSError: if a file can't be written; the one there before is left as it was.

    Example:
        >>> import tempfile
        >>> model = Transformer(TransformerConfig(50, 16, 2, 4, 12, n_experts=4, k=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, folder)
        ...     torch.equal(load(folder).head.weight, model.head.weight)
        True
    """
    family, settings = _written(model.config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ours = model.state_dict()
    tensors = {
        name: place.of(ours).reshape(place.shape_in(ours)).to("cpu", dtype, copy=True)
        for name, place in family.layout(model.config).items()
    }
    settings["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    write_text(json.dumps(settings, indent=2) + "\n", folder / "config.json")
    if tokenizer is not None:
        write_text(Path(tokenizer).read_text(encoding="utf-8"), folder / "tokenizer.json")
        write_text(json.dumps(TOKENIZER, indent=2) + "\n", folder / "tokenizer_config.json")


def load(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """The model of a folder, ready for evaluation. Nothing is downloaded; `save` has an example.

    Args:
        folder: with config.json and model.safetensors, or with several files and their index.
        device: of the model.
        dtype: of the model, whatever the file holds; None: torch's default, usually float32.

    Raises:
        FileNotFoundError: if the folder, config.json or the weights are missing.
        ValueError: if config.json lacks a value or describes what `Transformer` can't be, a file is
            damaged, or a tensor is missing, unknown or of the wrong shape; each is named.
    """
    folder = Path(folder)
    family, config = _described(folder)
    layout = family.layout(config)
    with torch.device("meta"):
        model = Transformer(config)
    known = {n for name, place in layout.items() for n in spellings(name, place)} | {HEAD}
    _fill(model, layout, folder, known, device, dtype, whole=True)
    return model.eval()


def _described(folder: Path) -> tuple[Family, TransformerConfig]:
    """The family and the model of a folder's config.json."""
    if not folder.is_dir():
        raise FileNotFoundError(_nowhere(folder))
    path = _existing(folder / "config.json")
    settings = read_object(path)
    try:
        kind = read(settings, "model_type", str)
        if kind in UNSUPPORTED:
            raise ValueError(
                f"model_type={kind!r} needs {UNSUPPORTED[kind]}, which `Transformer` lacks;"
                f" supported are {', '.join(FAMILIES)}"
            )
        if kind not in FAMILIES:
            raise ValueError(f"model_type={kind!r} is none of {', '.join(FAMILIES)}")
        return FAMILIES[kind], FAMILIES[kind].read_config(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _fill(
    module: nn.Module,
    layout: Layout,
    folder: Path,
    known: set[str],
    device: torch.device | str,
    dtype: torch.dtype | None,
    whole: bool,
) -> None:
    """Give a module of the meta device its tensors, and read them from the files."""
    wanted = {n for name, place in layout.items() for n in spellings(name, place)}
    found = survey(folder, None if whole else wanted)
    try:
        sources = matched(layout, module.state_dict(), found, known)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    dtypes = _dtypes(sources.values()) if dtype is None else defaultdict(lambda: dtype)
    _allocate(module, dtypes, device)
    with progress(sources.values(), folder.name) as advance:
        fill(module.state_dict(), sources.values(), advance)


def _dtypes(sources: Iterable[Source]) -> Mapping[str, torch.dtype]:
    """The dtype of each parameter: for all that of most numbers, but for a router its own."""
    numbers: Counter[torch.dtype] = Counter()
    own: dict[str, torch.dtype] = {}
    for source in sources:
        numbers[source.dtype] += math.prod(source.shape)
        if "router" in source.place.ours.split("."):
            before = own.get(source.place.ours, source.dtype)
            own[source.place.ours] = torch.promote_types(before, source.dtype)
    most = numbers.most_common(1)[0][0]
    return defaultdict(lambda: most, own)


def _allocate(
    module: nn.Module, dtypes: Mapping[str, torch.dtype], device: torch.device | str
) -> None:
    """Memory for the tensors of a module that is on the meta device; tied ones stay tied.

    A buffer keeps its dtype: it is one that must be exact.
    """
    new: dict[int, Tensor] = {}
    for prefix, part in module.named_modules():
        for name, old in [*part.named_parameters(recurse=False)]:
            ours = f"{prefix}.{name}".lstrip(".")
            if id(old) not in new:
                new[id(old)] = nn.Parameter(
                    torch.empty_like(old, device=device, dtype=dtypes[ours])
                )
            setattr(part, name, new[id(old)])
        for name, old in [*part.named_buffers(recurse=False)]:
            setattr(part, name, torch.empty_like(old, device=device))


def _written(config: TransformerConfig) -> tuple[Family, dict[str, Any]]:
    """The first family whose config.json gives the model back as it was, and that config.json."""
    refusals = []
    for family in dict.fromkeys(FAMILIES.values()):
        settings = family.write_config(config)
        before, after = _meaning(config), _meaning(family.read_config(settings))
        # A setting that means nothing to the model read back is lost with another that is named.
        lost = [f"{n}={v!r}" for n, v in before.items() if v != after.get(n, v)]
        if not lost:
            return family, settings
        refusals.append(f"{', '.join(lost)} has no place in the format of {settings['model_type']}")
    raise ValueError("; ".join(refusals))


def _meaning(config: TransformerConfig) -> dict[str, Any]:
    """All that decides what a model computes, with defaults filled in."""
    ignored = {"backend"}
    if not config.n_experts:
        ignored |= {"k", "every", "d_dense", "d_shared", "router", "router_options"}
        ignored |= {"capacity_factor", "capacity_options"}
    fields = vars(config) | {"n_kv_heads": config.kv_heads}
    if config.every == 1:
        fields["d_dense"] = None  # there are no dense blocks among the MoE blocks
    if math.isinf(config.capacity_factor):
        fields["capacity_options"] = {}
    options = fields.pop("router_options")
    for name, option in inspect.signature(TopKRouter).parameters.items():
        fields[f"router_options[{name!r}]"] = options.get(name, option.default)
    return {name: value for name, value in fields.items() if name.split("[")[0] not in ignored}


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint folder has one")
    return path


def _nowhere(folder: Path) -> str:
    said = (
        f"{folder} is not a folder (looked for at {folder.absolute()}). A checkpoint is a folder"
        " that holds config.json and model.safetensors, or several such files and their index"
    )
    if folder.name in ("tiny-moe", "tiny-dense"):
        said += (
            ". The course's own models are in a clone of the repository, not in the installed"
            " package. In a clone, corpora.data_file finds them from any folder: `from"
            f' moe_ref.course import corpora; checkpoints.load(corpora.data_file("{folder.name}"))`'
        )
    return said
