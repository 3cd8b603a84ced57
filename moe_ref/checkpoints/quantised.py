"""Quantised parts of a checkpoint: the mark in config.json, and the names of their tensors.

    "model_type": "moe_ref", "quantization_config": {
        "quant_method": "moe_ref", "version": 1, "model_type": "mixtral", "modules": {
            "blocks.0.mlp.experts": {"bits": 8, "group_size": 32}, ...}}

Bits are a list where experts differ. The tensors of such a part have the names and the form that
they have in the model, as `kernels.quantised.QuantisedWeight` describes it; all else is as in the
family whose model_type stands inside. The one outside is for other readers: transformers refuses a
model_type that it doesn't know, but for an unknown quant_method draws the weights at random.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..quantise import Model, Plan, plan_of, replaced
from .family import Layout, Place, read

METHOD, VERSION = "moe_ref", 1
TENSORS = ("codes", "scales")  # of a quantised weight


def write_mark(settings: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The config.json of a model, marked if it has quantised parts."""
    parts = {name: {"bits": b, "group_size": g} for name, (b, g) in plan_of(model).items()}
    if not parts:
        return settings
    about = {"quant_method": METHOD, "version": VERSION, "model_type": settings["model_type"]}
    return settings | {"model_type": METHOD, "quantization_config": about | {"modules": parts}}


def read_mark(settings: Mapping[str, Any]) -> tuple[Mapping[str, Any], Plan]:
    """A config.json without the mark, and bits and group of each quantised part, by its name."""
    if settings.get("model_type") != METHOD:
        return settings, {}
    about = read(settings, "quantization_config", dict)
    if (version := read(about, "version", int)) != VERSION:
        raise ValueError(f"version={version} of model_type={METHOD!r} is not {VERSION}")
    plan = {}
    for name, part in read(about, "modules", dict).items():
        if not isinstance(part, dict) or "bits" not in part:
            raise ValueError(f"{name}: {part!r} must be an object with bits and group_size")
        plan[name] = (part["bits"], read(part, "group_size", int))
    kind = read(about, "model_type", str)
    return {**settings, "model_type": kind, "quantization_config": None}, plan


def places(layout: Layout, plan: Plan) -> Layout:
    """A family's places, those of quantised weights with the tensors that hold them instead."""
    found: Layout = {}
    parts = set(plan)
    for name, place in layout.items():
        part = place.ours.rpartition(".")[0]
        if part not in plan or place.ours.endswith("bias"):
            found[name] = place
        else:
            parts.discard(part)
            for tensor in TENSORS:
                found[f"{place.ours}.{tensor}"] = Place(f"{place.ours}.{tensor}")
    if parts:
        raise ValueError(f"{', '.join(sorted(parts))} can't be quantised: not a part of this model")
    return found


def quantised(module: Model, layout: Layout, plan: Plan) -> Model:
    """A module on the meta device, its parts quantised as the places of a layout ask for it."""
    own = {}
    for name, place in layout.items():
        part = name.rsplit(".", 2)[0]  # as the whole model names it; in the module it may be moved
        if part in plan and name.endswith(f".{TENSORS[0]}"):
            own[place.ours.rsplit(".", 2)[0]] = plan[part]
    return replaced(module, own)
