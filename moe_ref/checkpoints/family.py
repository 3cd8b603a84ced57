"""What a family of checkpoint formats provides, and what the formats of Hugging Face share."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..config import TransformerConfig

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
KINDS |= {dict: "an object"}
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Coded:
    """Another form in which a file may hold a tensor: coded, in several tensors.

    Attributes:
        endings: of the names of these tensors, after the tensor's own name.
        decode: called with the same rows, along the first axis, of each of them; returns these rows
            of the tensor.
    """

    endings: tuple[str, ...]
    decode: Callable[..., Tensor]


@dataclass(frozen=True)
class Place:
    """Where in a model a tensor of a file belongs; saving reads it there, loading writes it there.

    Attributes:
        ours: the name of a parameter or buffer.
        index: of the part of it that the tensor fills; (): all.
        view: of that part, in the order of the file's numbers. It must not copy. None: as it is.
        shape: of the file's tensor; None: that of the view.
        coded: another form in which a file may hold the tensor; None: there is none.

    Example:
        >>> place = Place("w", 0, view=lambda w: w.mT, shape=(6,))
        >>> place.of({"w": torch.arange(6).view(1, 2, 3)}).tolist()
        [[0, 3], [1, 4], [2, 5]]
    """

    ours: str
    index: Any = ()
    view: Callable[[Tensor], Tensor] | None = None
    shape: tuple[int, ...] | None = None
    coded: Coded | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The part itself, a view of one of the model's tensors."""
        part = tensors[self.ours].detach()[self.index]
        return part if self.view is None else self.view(part)

    def shape_in(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The shape of the file's tensor."""
        return self.shape or tuple(self.of(tensors).shape)


Layout = dict[str, Place]


class Family(Protocol):
    """Formats that share the names of their tensors. A module with these functions is a family."""

    def layout(self, config: TransformerConfig) -> Layout:
        """The place of each tensor of a file, by its name; together they fill the model."""

    def read_config(self, settings: Mapping[str, Any]) -> TransformerConfig:
        """The model that a config.json describes; ValueError if `Transformer` can't be it."""

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """The config.json of a model; `save` reads it back and refuses the model if it changed."""


def backbone(config: TransformerConfig) -> Layout:
    """The places of everything but the feed-forward parts, which the formats name alike."""
    places = {"model.embed_tokens.weight": Place("embedding.weight")}
    for theirs, ours in blocks(config):
        places[f"{theirs}.input_layernorm.weight"] = Place(f"{ours}.attention_norm.weight")
        places[f"{theirs}.post_attention_layernorm.weight"] = Place(f"{ours}.mlp_norm.weight")
        for short, long in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
            name, place = f"{theirs}.self_attn.{short}_proj", f"{ours}.attention.{long}"
            places[f"{name}.weight"] = Place(f"{place}.weight")
    places["model.norm.weight"] = Place("norm.weight")
    if not config.tied:
        places[HEAD] = Place("head.weight")
    return places


def blocks(config: TransformerConfig) -> Iterator[tuple[str, str]]:
    """The names of each block: in a file, and in the model."""
    for i in range(config.n_layers):
        yield f"model.layers.{i}", f"blocks.{i}"


def gated(
    theirs: str,
    ours: str,
    d_ff: int,
    *,
    experts: int | None = None,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Layout:
    """The places of a gated feed-forward part, or of stacked experts whose files hold each apart.

    Args:
        theirs, ours: where it stands, in a file and in the model.
        d_ff: its hidden features.
        experts: how many there are; None: it is a single block, not experts.
        names: of the projections: gate, up and down.
    """
    gate, up, down = names
    halves = {gate: slice(0, d_ff), up: slice(d_ff, 2 * d_ff)}
    if experts is None:
        places = {
            f"{theirs}.{n}.weight": Place(f"{ours}.gate_up.weight", halves[n]) for n in halves
        }
        return places | {f"{theirs}.{down}.weight": Place(f"{ours}.down.weight")}
    places = {}
    for e in range(experts):
        for name, half in halves.items():
            places[f"{theirs}.{e}.{name}.weight"] = Place(f"{ours}.gate_up", (e, half))
        places[f"{theirs}.{e}.{down}.weight"] = Place(f"{ours}.down", e)
    return places


def read(settings: Mapping[str, Any], key: str, kind: type, *default: Any) -> Any:
    """A value of a config.json.

    Args:
        settings: what the file holds.
        key: the name of the value.
        kind: its type; float takes whole numbers too.
        default: stands in for a missing value or null; without one, the value must be there.

    Raises:
        ValueError: if the value is missing or of another type.

    Example:
        >>> read({"hidden_size": "64"}, "hidden_size", int)
        Traceback (most recent call last):
        ValueError: hidden_size='64' must be a whole number
    """
    value = settings.get(key)
    if value is None and default:
        return default[0]
    if key not in settings:
        raise ValueError(f"{key} is missing")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # isinstance would take true for a whole number
        raise ValueError(f"{key}={value!r} must be {KINDS[kind]}")
    return value


def refuse_others(settings: Mapping[str, Any], **values: Any) -> None:
    """ValueError that names the first setting that is there and has another value than here."""
    for name, value in values.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name}={settings[name]!r} is not {value!r}, which is all we have")


def read_backbone(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `TransformerConfig` that the formats name alike; no feed-forward part."""
    rope = read(settings, "rope_parameters", dict, None) or read(settings, "rope_scaling", dict, {})
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type={rope['rope_type']!r} is not default")
    heads = read(settings, "num_attention_heads", int)
    width = read(settings, "hidden_size", int)
    head_dim = read(settings, "head_dim", int, None)
    if head_dim is not None and head_dim * heads != width:
        raise ValueError(f"head_dim={head_dim} is not hidden_size / num_attention_heads")
    return {
        "vocab_size": read(settings, "vocab_size", int),
        "d_model": width,
        "n_layers": read(settings, "num_hidden_layers", int),
        "n_heads": heads,
        "n_kv_heads": read(settings, "num_key_value_heads", int, None),
        "tied": read(settings, "tie_word_embeddings", bool, False),
        "rope_theta": read(rope, "rope_theta", float, read(settings, "rope_theta", float, 1e4)),
        "norm_eps": read(settings, "rms_norm_eps", float),
    }


def write_backbone(config: TransformerConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The settings that the formats name alike; no feed-forward part."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_features,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
