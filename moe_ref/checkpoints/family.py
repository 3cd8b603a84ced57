"""What a family of checkpoint formats provides, and what the formats of Hugging Face share."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .._validate import check_sizes
from ..config import TransformerConfig
from ..rotary import Yarn

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

    Example:
        >>> coded = Coded(("_codes", "_scales"), lambda codes, scales: codes * scales[:, None])
        >>> coded.decode(torch.tensor([[2, 3]], dtype=torch.int8), torch.tensor([0.5]))
        tensor([[1.0000, 1.5000]])
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
        places |= _attention(config, f"{theirs}.self_attn", f"{ours}.attention")
    places["model.norm.weight"] = Place("norm.weight")
    if not config.tied:
        places[HEAD] = Place("head.weight")
    return places


def _attention(config: TransformerConfig, theirs: str, ours: str) -> Layout:
    queries = config.n_heads * config.head_features
    keys = queries + config.kv_heads * config.head_features
    rows = {"q": slice(0, queries), "k": slice(queries, keys), "v": slice(keys, 2 * keys - queries)}
    places = {}
    for short in "qkvo":
        own, part = ("out", ()) if short == "o" else ("qkv", rows[short])
        places[f"{theirs}.{short}_proj.weight"] = Place(f"{ours}.{own}.weight", part)
        if config.out_bias if short == "o" else config.qkv_bias:
            places[f"{theirs}.{short}_proj.bias"] = Place(f"{ours}.{own}.bias", part)
    if config.qk_norm:
        for short, long in (("q", "query"), ("k", "key")):
            places[f"{theirs}.{short}_norm.weight"] = Place(f"{ours}.{long}_norm.weight")
    if config.sinks:
        places[f"{theirs}.sinks"] = Place(f"{ours}.sinks")
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
    heads = read(settings, "num_attention_heads", int)
    width = read(settings, "hidden_size", int)
    d_head = read(settings, "head_dim", int, None)
    return {
        "vocab_size": read(settings, "vocab_size", int),
        "d_model": width,
        "n_layers": read(settings, "num_hidden_layers", int),
        "n_heads": heads,
        "n_kv_heads": read(settings, "num_key_value_heads", int, None),
        "d_head": None if d_head is None or d_head * heads == width else d_head,
        "windows": _read_windows(settings),
        "tied": read(settings, "tie_word_embeddings", bool, False),
        "rope_theta": read(rope, "rope_theta", float, read(settings, "rope_theta", float, 1e4)),
        "yarn": _read_yarn(rope),
        "norm_eps": read(settings, "rms_norm_eps", float),
    }


def _read_yarn(rope: Mapping[str, Any]) -> Yarn | None:
    kind = read(rope, "rope_type", str, read(rope, "type", str, "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"rope_type={kind!r} is neither default nor yarn")
    refuse_others(rope, mscale=None, mscale_all_dim=None)
    return Yarn(
        factor=read(rope, "factor", float),
        original_length=read(rope, "original_max_position_embeddings", int),
        beta_fast=read(rope, "beta_fast", float, 32.0),
        beta_slow=read(rope, "beta_slow", float, 1.0),
        truncate=read(rope, "truncate", bool, True),
        attention_factor=read(rope, "attention_factor", float, None),
    )


def _read_windows(settings: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The window of each block; a setting may be there and switched off."""
    window = read(settings, "sliding_window", int, None)
    if window is None or not read(settings, "use_sliding_window", bool, True):
        return (None,)
    kinds = settings.get("layer_types")
    if kinds is None:
        if "use_sliding_window" in settings:
            raise ValueError("use_sliding_window=True needs layer_types, which is missing")
        return (window,)
    known = {"sliding_attention": window, "full_attention": None}
    if not isinstance(kinds, list) or not set(kinds) <= known.keys():
        raise ValueError(f"layer_types={kinds!r} must be a list of {' and '.join(known)}")
    return tuple(known[kind] for kind in kinds)


def write_backbone(config: TransformerConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The settings that the formats name alike; no feed-forward part."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    length = 32768
    if config.yarn is not None:
        rope |= {"rope_type": "yarn"} | vars(config.yarn)
        rope["original_max_position_embeddings"] = rope.pop("original_length")
        length = int(config.yarn.factor * config.yarn.original_length)
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
        "max_position_embeddings": length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def write_windows(config: TransformerConfig) -> dict[str, Any]:
    """The settings of formats in which each block has a window or has none."""
    windows = [config.window_of(layer) for layer in range(config.n_layers)]
    widest = max((window for window in windows if window is not None), default=None)
    return {
        "sliding_window": widest,
        "use_sliding_window": widest is not None,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
    }


def read_sparse(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Which blocks have experts, where some may be dense, and how wide both kinds are.

    Released files say num_experts; transformers saves some of them with num_local_experts.
    """
    n_layers = read(settings, "num_hidden_layers", int)
    every = read(settings, "decoder_sparse_step", int, 1)
    dense = settings.get("mlp_only_layers") or []
    name = "num_local_experts" if "num_local_experts" in settings else "num_experts"
    number = read(settings, name, int)
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ValueError(f"mlp_only_layers={dense!r} must be a list of whole numbers")
    check_sizes(decoder_sparse_step=every)
    moe = [(i + 1) % every == 0 and i not in dense for i in range(n_layers)]
    return {
        "n_experts": tuple(number * is_moe for is_moe in moe) if not all(moe) else number,
        "d_ff": read(settings, "moe_intermediate_size", int),
        "d_dense": read(settings, "intermediate_size", int),
        "k": read(settings, "num_experts_per_tok", int),
    }


def write_sparse(config: TransformerConfig) -> dict[str, Any]:
    """The same, the other way round."""
    numbers = [config.experts_of(layer) for layer in range(config.n_layers)]
    return {
        "num_experts": max(numbers),
        "moe_intermediate_size": config.d_ff,
        "intermediate_size": config.dense_features,
        "num_experts_per_tok": config.k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, number in enumerate(numbers) if not number],
    }


def sparse(config: TransformerConfig) -> Layout:
    """The places of routers and experts, and of dense blocks, named as in Qwen's formats."""
    places: Layout = {}
    for layer, (theirs, ours) in enumerate(blocks(config)):
        theirs, ours, number = f"{theirs}.mlp", f"{ours}.mlp", config.experts_of(layer)
        if not number:
            places |= gated(theirs, ours, config.dense_features)
            continue
        places[f"{theirs}.gate.weight"] = Place(f"{ours}.router.weight")
        places |= gated(f"{theirs}.experts", f"{ours}.experts", config.d_ff, experts=number)
    return places
