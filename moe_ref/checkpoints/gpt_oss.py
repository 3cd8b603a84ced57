"""gpt-oss: biases everywhere, clipped SwiGLU, attention sinks, a window in every second block.

Source: OpenAI 2025 (2508.10925), section 2; the names are those of transformers'
`GptOssForCausalLM`. The released files hold the experts in MXFP4: numbers of four bits, 32 of them
to a scale (OCP Microscaling Formats 1.0, section 5.2).
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..config import TransformerConfig
from .family import (
    Coded,
    Layout,
    Place,
    backbone,
    blocks,
    read,
    read_backbone,
    refuse_others,
    write_backbone,
    write_windows,
)

FOUR_BITS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and from 8 on the same, negative


def decode(
    blocks: UInt8[Tensor, "experts outputs groups bytes"],
    scales: UInt8[Tensor, "experts outputs groups"],
) -> Float[Tensor, "experts inputs outputs"]:
    """Experts held in MXFP4, in bfloat16. The low half of a byte comes first; scales are 2^(s-127).

    Example:
        >>> two_to_a_byte, scale = torch.tensor([[[[0x21]]]]).byte(), torch.tensor([[[128]]]).byte()
        >>> decode(two_to_a_byte, scale).tolist()
        [[[1.0], [2.0]]]
    """
    numbers = torch.tensor(FOUR_BITS, dtype=torch.bfloat16, device=blocks.device)
    numbers = torch.cat([numbers, -numbers])
    halves = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    exponents = scales.to(torch.int32)[..., None] - 127
    return torch.ldexp(numbers[halves.int()], exponents).flatten(-2).mT


def layout(config: TransformerConfig) -> Layout:
    """The place of each tensor of a file, by its name.

    Files have inputs before outputs, and the rows of gate and up by turns.
    """
    places, ff, wide = backbone(config), config.d_ff, config.d_model
    mxfp4 = Coded(("_blocks", "_scales"), decode)
    for layer, (theirs, ours) in enumerate(blocks(config)):
        theirs, ours, number = f"{theirs}.mlp", f"{ours}.mlp", config.experts_of(layer)
        for name in ("weight", "bias"):
            own = "weight" if name == "weight" else "logit_bias"
            places[f"{theirs}.router.{name}"] = Place(f"{ours}.router.{own}")
        theirs, ours = f"{theirs}.experts", f"{ours}.experts"
        places[f"{theirs}.gate_up_proj"] = Place(
            f"{ours}.gate_up",
            view=lambda w: w.unflatten(1, (2, -1)).permute(0, 3, 2, 1),
            shape=(number, wide, 2 * ff),
            coded=mxfp4,
        )
        places[f"{theirs}.gate_up_proj_bias"] = Place(
            f"{ours}.gate_up_bias",
            view=lambda b: b.unflatten(1, (2, -1)).mT,
            shape=(number, 2 * ff),
        )
        places[f"{theirs}.down_proj"] = Place(f"{ours}.down", view=lambda w: w.mT, coded=mxfp4)
        places[f"{theirs}.down_proj_bias"] = Place(f"{ours}.down_bias")
    return places


def read_config(settings: Mapping[str, Any]) -> TransformerConfig:
    """The model that a config.json describes; ValueError if `Transformer` can't be it."""
    refuse_others(settings, hidden_act="silu", swiglu_alpha=1.702, swiglu_limit=7.0)
    bias = read(settings, "attention_bias", bool, True)
    return TransformerConfig(
        **read_backbone(settings),
        d_ff=read(settings, "intermediate_size", int),
        n_experts=read(settings, "num_local_experts", int),
        k=read(settings, "num_experts_per_tok", int),
        router_options={"logit_bias": True},
        activation="clipped_swiglu",
        bias=True,
        qkv_bias=bias,
        out_bias=bias,
        sinks=True,
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The config.json of a model."""
    settings = write_backbone(config, "gpt_oss", "GptOssForCausalLM") | write_windows(config)
    return settings | {
        "intermediate_size": config.d_ff,
        "num_local_experts": config.experts_of(0),
        "num_experts_per_tok": config.k,
        "attention_bias": config.qkv_bias,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    }
