"""Quantised parts of a checkpoint: the mark in config.json, and the names of their tensors.

    "quantization_config": {"quant_method": "moe_ref", "version": 1, "modules": {
        "blocks.0.mlp.experts": {"bits": 8, "group_size": 32}, ...}}

Bits are a list where experts differ. The tensors of such a part have the names and the form that
they have in the model, as `kernels.quantised.QuantisedWeight` describes it; all others have those
of the family. Other readers refuse the mark by its quant_method.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..quantise import Model, Plan, plan_of, replaced
from .family import Layout, Place, read

METHOD, VERSION = "moe_ref", 1
TENSORS = ("codes", "scales")  # of a quantised weight


def write_mark(model: nn.Module) -> dict[str, Any]:
    """What config.json says of a model's quantised parts; nothing, if it has none."""
    parts = {name: {"bits": b, "group_size": g} for name, (b, g) in plan_of(model).items()}
    about = {"quant_method": METHOD, "version": VERSION, "modules": parts}
    return {"quantization_config": about} if parts else {}


def read_mark(about: Mapping[str, Any]) -> Plan:
    """Bits and group of each quantised part, by its name; ValueError if they make no sense."""
    if (version := read(about, "version", int)) != VERSION:
        raise ValueError(f"version={version} of quant_method={METHOD!r} is not {VERSION}")
    plan = {}
    for name, part in read(about, "modules", dict).items():
        if not isinstance(part, dict) or "bits" not in part:
            raise ValueError(f"{name}: {part!r} must be an object with bits and group_size")
        plan[name] = (part["bits"], read(part, "group_size", int))
    return plan


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
