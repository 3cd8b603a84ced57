"""The families of checkpoints as transformers has them, with the settings of released models.

Sizes are scaled down; ratios, switches and factors are those of the released config.json, which the
class defaults often are not.
"""

import torch
import transformers
from torch import nn

VOCABULARY, LENGTH = 120, 24  # tokens; the windows below are shorter
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


def theta(base):
    return {"rope_type": "default", "rope_theta": base}


YARN = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
# name: the class in transformers, and what of its configuration is not common to all.
FAMILIES = {
    # Mixtral 8x7B v0.1
    "mixtral": (
        "Mixtral",
        dict(intermediate_size=224, num_local_experts=8, num_experts_per_tok=2)
        | dict(rms_norm_eps=1e-5, sliding_window=None, rope_parameters=theta(1e6)),
    ),
    # Mistral 7B v0.1, whose every block has a window, and v0.3
    "mistral-v0.1": (
        "Mistral",
        dict(intermediate_size=224, rms_norm_eps=1e-5, sliding_window=7)
        | dict(rope_parameters=theta(1e4), head_dim=8),
    ),
    "mistral-v0.3": (
        "Mistral",
        dict(intermediate_size=224, rms_norm_eps=1e-5, sliding_window=None)
        | dict(rope_parameters=theta(1e6), head_dim=8),
    ),
    # OLMoE-1B-7B-0924: not grouped, weights not renormalised
    "olmoe": (
        "Olmoe",
        dict(intermediate_size=32, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False)
        | dict(num_key_value_heads=8, rms_norm_eps=1e-5, rope_parameters=theta(1e4)),
    ),
    # Qwen1.5-MoE-A2.7B, and one with dense blocks between
    "qwen2_moe": (
        "Qwen2Moe",
        dict(moe_intermediate_size=44, shared_expert_intermediate_size=176, num_experts=60)
        | dict(intermediate_size=176, num_experts_per_tok=4, norm_topk_prob=False)
        | dict(num_key_value_heads=8, rms_norm_eps=1e-6, rope_parameters=theta(1e6))
        | dict(use_sliding_window=False, sliding_window=32768, max_window_layers=21),
    ),
    "qwen2_moe-between": (
        "Qwen2Moe",
        dict(moe_intermediate_size=44, shared_expert_intermediate_size=176, num_experts=16)
        | dict(intermediate_size=100, num_experts_per_tok=4, norm_topk_prob=False)
        | dict(decoder_sparse_step=2, mlp_only_layers=[3], rope_parameters=theta(1e6)),
    ),
    # Qwen3-30B-A3B: heads together twice as wide as the model
    "qwen3_moe": (
        "Qwen3Moe",
        dict(moe_intermediate_size=24, num_experts=128, num_experts_per_tok=8, head_dim=16)
        | dict(intermediate_size=192, norm_topk_prob=True, decoder_sparse_step=1)
        | dict(mlp_only_layers=[], rms_norm_eps=1e-6, rope_parameters=theta(1e6))
        | dict(use_sliding_window=False, sliding_window=None),
    ),
    # Qwen3-8B, and Qwen3-0.6B, which is tied
    "qwen3": (
        "Qwen3",
        dict(intermediate_size=192, head_dim=16, rms_norm_eps=1e-6, rope_parameters=theta(1e6))
        | dict(use_sliding_window=False, sliding_window=None, max_window_layers=36),
    ),
    # Granite 3.0 1B-A400M
    "granitemoe": (
        "GraniteMoe",
        dict(intermediate_size=32, num_local_experts=32, num_experts_per_tok=8)
        | dict(embedding_multiplier=12.0, logits_scaling=6.0, residual_multiplier=0.22)
        | dict(attention_multiplier=0.015625, rms_norm_eps=1e-6, rope_parameters=theta(1e4))
        | dict(tie_word_embeddings=True),
    ),
    # gpt-oss-20b: every second block has a window
    "gpt_oss": (
        "GptOss",
        dict(intermediate_size=64, num_local_experts=32, num_experts_per_tok=4, head_dim=16)
        | dict(sliding_window=7, rms_norm_eps=1e-5, rope_parameters=YARN)
        | dict(layer_types=["sliding_attention", "full_attention"] * 2),
    ),
}


def theirs_of(name, tied=None):
    """A model of transformers, all of its parameters drawn at random: norms and biases too."""
    family, options = FAMILIES[name]
    options = COMMON | options | ({} if tied is None else {"tie_word_embeddings": tied})
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    config._experts_implementation = "eager"  # takes any width, in any dtype
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in key), std=0.2)
    return model


def tokens(batch=2, seq=LENGTH):
    return torch.randint(VOCABULARY, (batch, seq), generator=torch.Generator().manual_seed(1))
