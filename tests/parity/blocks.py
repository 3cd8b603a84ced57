"""Pairs of an MoE block of transformers and a `MoELayer` that works on its very tensors.

The blocks take the options of the released models, scaled down, with transformers' own ("eager")
implementation of the experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AXK2Config,
    DeepseekV3Config,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.axk2.modeling_axk2 import AXK2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeMoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
)

from moe_ref import Capacity, Experts, FeedForward, MoELayer, Routing, SwitchRouter, TopKRouter

D_MODEL = 64
PLACES = 4  # of each expert and sequence, in the Switch block


@dataclass
class Pair:
    """The block, our layer, and how to run it where it is more than `layer(x)`."""

    block: nn.Module
    layer: MoELayer
    forward: Callable[[Tensor], tuple[Tensor, Routing]]


def configured(config_class, block_class, **options):
    config = config_class(hidden_size=D_MODEL, **options)
    config._experts_implementation = "eager"
    return block_class(config)


def randomise(block: nn.Module, seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=scale)


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a parameter be this tensor, or what was computed from the tensors of the block."""
    delattr(module, name)
    setattr(module, name, tensor)


def stacked(block: nn.Module, router: nn.Module, experts: Experts, shared=None) -> Pair:
    """For blocks whose experts are stacked as ours are: the tensors are taken as they stand."""
    gate = block.router if hasattr(block, "router") else block.gate
    router.weight = gate.weight
    experts.gate_up = block.experts.gate_up_proj
    experts.down = block.experts.down_proj
    layer = MoELayer(router, experts, shared=shared)
    return Pair(block, layer, layer)


def shared_expert(block: nn.Module) -> FeedForward:
    """A gate_proj and up_proj, concatenated, are our gate_up."""
    shared = FeedForward(D_MODEL, len(block.gate_proj.weight))
    put(shared.gate_up, "weight", torch.cat([block.gate_proj.weight, block.up_proj.weight]))
    shared.down.weight = block.down_proj.weight
    return shared


def mixtral(seed: int, scale: float) -> Pair:
    """Mixtral 8x7B: 8 experts, top-2, weights renormalised; d_ff 3.5 times d_model."""
    options = dict(intermediate_size=224, num_local_experts=8, num_experts_per_tok=2)
    block = configured(MixtralConfig, MixtralSparseMoeBlock, **options)
    randomise(block, seed, scale)
    return stacked(block, TopKRouter(D_MODEL, 8, 2), Experts(8, D_MODEL, 224))


def olmoe(seed: int, scale: float) -> Pair:
    """OLMoE 1B-7B: 64 experts, top-8, weights not renormalised; d_ff half of d_model."""
    options = dict(intermediate_size=32, num_experts=64, num_experts_per_tok=8)
    block = configured(OlmoeConfig, OlmoeSparseMoeBlock, norm_topk_prob=False, **options)
    randomise(block, seed, scale)
    router = TopKRouter(D_MODEL, 64, 8, renormalize=False)
    return stacked(block, router, Experts(64, D_MODEL, 32))


def qwen2(seed: int, scale: float) -> Pair:
    """Qwen1.5-MoE-A2.7B: 60 experts, top-4, not renormalised; a shared expert with a gate.

    The gate of the shared expert is a sigmoid of its own, beside the layer.
    """
    options = dict(moe_intermediate_size=44, num_experts=60, num_experts_per_tok=4)
    options |= dict(shared_expert_intermediate_size=176, norm_topk_prob=False)
    block = configured(Qwen2MoeConfig, Qwen2MoeSparseMoeBlock, **options)
    randomise(block, seed, scale)
    router = TopKRouter(D_MODEL, 60, 4, renormalize=False)
    pair = stacked(block, router, Experts(60, D_MODEL, 44))
    shared = shared_expert(block.shared_expert)

    def forward(x: Tensor) -> tuple[Tensor, Routing]:
        y, routing = pair.layer(x)
        gate = F.linear(x, block.shared_expert_gate.weight).sigmoid()
        return y + gate * shared(x), routing

    pair.forward = forward
    return pair


def qwen3(seed: int, scale: float) -> Pair:
    """Qwen3-30B-A3B: 128 experts, top-8, renormalised; d_ff 3/8 of d_model."""
    options = dict(moe_intermediate_size=24, num_experts=128, num_experts_per_tok=8)
    block = configured(Qwen3MoeConfig, Qwen3MoeSparseMoeBlock, norm_topk_prob=True, **options)
    randomise(block, seed, scale)
    return stacked(block, TopKRouter(D_MODEL, 128, 8), Experts(128, D_MODEL, 24))


GROUPS = dict(n_groups=8, groups_kept=4, scale=2.5, score="sigmoid", selection_bias=True)


def deepseek(seed: int, scale: float, bias: float = 0.0) -> Pair:
    """DeepSeek-V3: sigmoid, bias, 4 of 8 groups, top-8, scale 2.5, a shared expert.

    64 experts in place of 256, d_ff 2/7 of d_model, and biases normal around `bias`.
    """
    options = dict(moe_intermediate_size=20, n_routed_experts=64, num_experts_per_tok=8)
    options |= dict(n_group=8, topk_group=4, routed_scaling_factor=2.5, norm_topk_prob=True)
    block = configured(DeepseekV3Config, DeepseekV3MoE, n_shared_experts=1, **options)
    randomise(block, seed, scale)
    router = TopKRouter(D_MODEL, 64, 8, **GROUPS)
    nn.init.normal_(router.bias, mean=bias, std=0.1)
    block.gate.e_score_correction_bias = router.bias
    shared = shared_expert(block.shared_experts)
    return stacked(block, router, Experts(64, D_MODEL, 20), shared)


def axk2_router(bias: Tensor) -> nn.Module:
    """A.X-K2 with the groups of `deepseek`: only the router, for what it does with its groups."""
    config = AXK2Config(
        hidden_size=D_MODEL, n_routed_experts=64, num_experts_per_tok=8, n_group=8, topk_group=4
    )
    router = AXK2TopkRouter(config)
    router.e_score_correction_bias = bias
    return router


def granite(seed: int, scale: float) -> Pair:
    """Granite 3.0 3B-A800M: 40 experts, softmax over the top 8 logits; d_ff 1/3 of d_model."""
    options = dict(intermediate_size=20, num_local_experts=40, num_experts_per_tok=8)
    block = configured(GraniteMoeConfig, GraniteMoeMoE, **options)
    randomise(block, seed, scale)
    return stacked(block, TopKRouter(D_MODEL, 40, 8), Experts(40, D_MODEL, 20))


def switch(seed: int, scale: float, places: int = PLACES) -> Pair:
    """Switch-Base-8: 8 experts without gate, relu, d_ff 4 times d_model; capacity by sequence.

    transformers limits each sequence by itself, so our layer is run on one after the other.
    """
    options = dict(d_ff=256, num_experts=8, expert_capacity=places, dense_act_fn="relu")
    config = SwitchTransformersConfig(d_model=D_MODEL, **options)
    block = SwitchTransformersSparseMLP(config).eval()  # no dropout, no jitter
    randomise(block, seed, scale)
    experts = Experts(8, D_MODEL, 256, activation="relu")
    theirs = [block.experts[f"expert_{e}"] for e in range(8)]
    put(experts, "up", torch.stack([expert.wi.weight for expert in theirs]))
    put(experts, "down", torch.stack([expert.wo.weight for expert in theirs]))
    router = SwitchRouter(D_MODEL, 8)
    router.weight = block.router.classifier.weight
    layer = MoELayer(router, experts, capacity=Capacity(1e-9, minimum=places))

    def forward(x: Tensor) -> tuple[Tensor, Routing]:
        answers = [layer(sequence) for sequence in x]
        together = router(x.reshape(-1, D_MODEL))
        served = torch.cat([routing.experts for _, routing in answers])
        fields = {**vars(together), "experts": served, "asked": together.experts}
        return torch.stack([y for y, _ in answers]), Routing(**fields)

    return Pair(block, layer, forward)
