"""The published models: their figures by arithmetic, their sources, each of them built small."""

import csv
import dataclasses
import re
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_ref import MoELayer, Transformer, cost
from moe_ref._data import data_file
from moe_ref.catalog import MODELS, Model, table
from moe_ref.catalog.reading import read

NAMES = list(MODELS)
EXACT = [name for name, model in MODELS.items() if not model.lacks]
each = pytest.mark.parametrize("name", NAMES)


def rows() -> list[dict[str, str]]:
    with data_file("models.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------- published figures

# In billions, as the papers, cards and known computations have them; None: not said.
KNOWN = {
    "mixtral-8x7b": (46.70, 12.88),
    "mixtral-8x22b": (140.6, 39.2),
    "dbrx": (131.6, 36.5),
    "deepseek-v3": (671.0, 37.6),
    "qwen3-30b-a3b": (30.5, 3.35),
    "qwen3-235b-a22b": (235.1, 22.2),
    "olmoe-1b-7b": (6.92, 1.28),
    "kimi-k2": (1026, 32.9),
    "glam-64b-64e": (1162, 96.6),
    "grok-1": (315.7, 83.8),
    "deepseek-moe-16b": (16.4, 2.83),
    "deepseek-v2": (236, 21.4),
    "qwen1.5-moe-a2.7b": (14.3, 2.7),
    "phi-3.5-moe": (41.9, 6.6),
    "switch-xxl": (395, None),
    "switch-c": (1571, None),
    "st-moe-32b": (270, None),
    "deepspeed-1.3b-moe-128": (52, None),
    "deepspeed-1.3b-pr-moe-64-128": (31, None),
}


@pytest.mark.parametrize("name", KNOWN)
def test_totals_and_active_parameters_are_the_known_ones(name):
    total, active = KNOWN[name]
    digits = len(str(total).partition(".")[2])
    assert round(MODELS[name].total / 1e9, digits) == total
    if active is not None:
        digits = len(str(active).partition(".")[2])
        assert round(MODELS[name].active / 1e9, digits) == active


@pytest.mark.parametrize(
    ("name", "total", "active"), [("gpt-oss-120b", 116.83, 5.13), ("gpt-oss-20b", 20.91, 3.61)]
)
def test_gpt_oss_is_published_without_the_input_embedding(name, total, active):
    model = MODELS[name]
    assert round(model.total / 1e9, 2) == total
    assert round(model.active_without_embeddings / 1e9, 2) == active
    assert model.active - model.active_without_embeddings == 201_088 * 2880


@each
def test_a_total_meets_the_published_within_one_percent_or_a_note_says_why_not(name):
    model = MODELS[name]
    assert abs(model.total / model.published_total - 1) < 0.01 or re.search(r"\d", model.note)


def test_glam_activates_eight_percent():
    model = MODELS["glam-64b-64e"]
    assert round(model.active / model.total, 3) == 0.083


def test_switch_xxl_with_the_64_experts_of_its_table_is_half_of_what_the_table_says():
    model = MODELS["switch-xxl"]
    as_told = dataclasses.replace(model, experts=tuple(min(n, 64) for n in model.experts))
    assert 200e9 < as_told.total < 202e9 < 394e9 < model.total < 396e9


def test_the_experts_of_gshard_alone_are_more_than_its_published_total():
    (experts,) = [p for p in MODELS["gshard-600b"].parts() if p.name == "experts"]
    assert experts.places * experts.n_experts == 36_864  # table 1 prints 36,684
    assert 618e9 < experts.places * experts.n_experts * experts.weights < 619e9


def test_the_lstm_model_has_the_parameters_and_operations_of_its_table():
    """Table 8 of 1701.06538: 137,577.6M without embedding and softmax, 9.7M operations a token."""
    model = MODELS["lstm-moe-131072"]
    outside = 2 * model.vocab_size * model.d_model
    assert round((model.total - outside) / 1e6, 1) == 137_577.6
    assert round((model.active - outside) / 1e6, 1) == 9.7


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("moonlight-16b-a3b", 15.29, 2.24),  # 2502.16982, without embeddings
        ("minimax-text-01", None, 45.9),
        ("glm-4.5", None, 32),
        ("glm-4.5-air", None, 12),
        ("glm-5", None, 40),
        ("qwen3-next-80b-a3b", None, 3),
    ],
)
def test_some_count_without_embedding_and_head(name, total, active):
    model = MODELS[name]
    outside = 2 * model.vocab_size * model.d_model
    assert round((model.active - outside) / 1e9, len(str(active).partition(".")[2])) == active
    if total is not None:
        assert round((model.total - outside) / 1e9, 2) == total


# ----------------------------------------------------------------------- other people's arithmetic

# What transformers calls a family, and what it calls the sizes beyond the usual ones.
LATENT = dict(q_lora_rank="q_rank", kv_lora_rank="kv_rank", qk_nope_head_dim="d_head")
LATENT |= dict(qk_rope_head_dim="d_rope", v_head_dim="d_value", moe_intermediate_size="d_ff")
LATENT |= dict(intermediate_size="d_dense", n_routed_experts="n_experts")
MOE = dict(moe_intermediate_size="d_ff", num_experts="n_experts")
LOCAL = dict(intermediate_size="d_ff", num_local_experts="n_experts")
DELTA = dict(linear_num_key_heads="linear_key_heads", linear_num_value_heads="linear_value_heads")
DELTA |= dict(linear_conv_kernel_dim="convolution", shared_expert_intermediate_size="d_shared")
GLM = {**LATENT, "index_n_heads": "index_heads", "index_head_dim": "d_index"}
FAMILIES = {
    "mixtral": ("mixtral", LOCAL),
    "deepseek-v2": ("deepseek_v2", LATENT),
    "deepseek-v3.2": ("deepseek_v32", GLM),
    "deepseek-v3": ("deepseek_v3", LATENT),
    "kimi": ("deepseek_v3", LATENT),
    "moonlight": ("deepseek_v3", LATENT),
    "glm-5": ("glm_moe_dsa", GLM),
    "glm-4.5": ("glm4_moe", LATENT),
    "llama": ("llama4_text", LOCAL),
    "minimax-text": ("minimax", LOCAL),
    "minimax-m2": ("minimax_m2", LOCAL),
    "phi": ("phimoe", LOCAL),
    "gpt-oss": ("gpt_oss", LOCAL),
    "granite": ("granitemoe", LOCAL),
    "olmoe": ("olmoe", {**LOCAL, "num_experts": "n_experts"}),
    "qwen1.5": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": "d_shared"}),
    "qwen3-next": ("qwen3_next", {**MOE, **DELTA}),
    "qwen3.5": ("qwen3_5_moe_text", {**MOE, **DELTA}),
    "qwen3-": ("qwen3_moe", MOE),
}


def theirs(model: Model) -> int:
    """The parameters of the model as transformers builds it, on no device."""
    family, names = next(v for start, v in FAMILIES.items() if model.name.startswith(start))
    names = {"num_hidden_layers": "n_layers", "num_attention_heads": "n_heads", **names}
    names |= {"vocab_size": "vocab_size", "hidden_size": "d_model", "num_experts_per_tok": "k"}
    settings = {theirs: getattr(model, ours) for theirs, ours in names.items()}
    settings |= {"num_key_value_heads": model.n_kv_heads or model.n_heads}
    settings |= {"tie_word_embeddings": model.tied, "lm_head_bias": model.head_bias}
    settings |= {"attention_bias": model.qkv_bias, "use_qk_norm": model.qk_norm is not None}
    if model.attention == "latent":
        settings |= {"n_shared_experts": model.d_shared // model.d_ff}
        settings |= {"q_lora_rank": model.q_rank or None}
    else:
        settings |= {"head_dim": model.d_head, "n_shared_experts": 1}
    settings |= {"first_k_dense_replace": next(i for i, n in enumerate(model.experts) if n)}
    if family == "llama4_text":
        settings |= {"interleave_moe_layer_step": 2 if 0 in model.experts else 1}
        settings |= {"intermediate_size_mlp": model.d_dense or model.d_ff}
    if family == "minimax":
        period = ["linear_attention"] * (model.full_every - 1) + ["full_attention"]
        settings |= {"layer_types": period * (model.n_layers // model.full_every)}
    config = AutoConfig.for_model(family, **settings)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(tuple(FAMILIES))])
def test_transformers_builds_a_model_of_as_many_parameters(name):
    assert MODELS[name].total == theirs(MODELS[name])


def test_transformers_dbrx_has_as_many_parameters():
    m = MODELS["dbrx"]
    attention = {"kv_n_heads": m.n_kv_heads, "rope_theta": m.rope_theta}
    experts = {"ffn_hidden_size": m.d_ff, "moe_num_experts": m.n_experts, "moe_top_k": m.k}
    experts |= {"hidden_size": m.d_model}
    sizes = {name: getattr(m, name) for name in ("d_model", "n_heads", "n_layers", "vocab_size")}
    config = AutoConfig.for_model("dbrx", attn_config=attention, ffn_config=experts, **sizes)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    assert m.total == sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize("name", EXACT)
def test_a_model_that_can_be_built_has_the_parameters_that_are_counted(name):
    with torch.device("meta"):
        built = Transformer(MODELS[name].config())
    assert sum(parameter.numel() for parameter in built.parameters()) == MODELS[name].total


def test_the_default_sizes_of_olmoe_in_transformers_build_another_model():
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmoe"))
    assert round(sum(parameter.numel() for parameter in built.parameters()) / 1e9, 1) == 13.4


# ------------------------------------------------------------------------------- each, built small


@each
def test_every_model_can_be_built_small_and_learns(name):
    torch.manual_seed(0)
    config = MODELS[name].config(shrink=100, exact=False)
    model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 20e6
    output = model(torch.randint(0, config.vocab_size, (2, 8)))
    output.logits.logsumexp(dim=-1).sum().backward()
    assert len(output.routings) == sum(map(config.is_moe, range(config.n_layers))) >= 1
    for layer in (part for part in model.modules() if isinstance(part, MoELayer)):
        assert layer.experts.down.grad.abs().sum() > 0
        assert layer.router.weight.grad.abs().sum() > 0


@each
def test_a_small_model_keeps_what_makes_its_family(name):
    model, config = MODELS[name], MODELS[name].config(shrink=100, exact=False)
    kinds = [n > 0 for n in model.experts]
    small = [config.is_moe(layer) for layer in range(config.n_layers)]
    assert set(small) == set(kinds) and small[0] == kinds[0] and small[-1] == kinds[-1]
    assert config.k == model.k
    assert config.n_heads % config.kv_heads == 0
    assert (config.kv_heads < config.n_heads) <= (
        (model.n_kv_heads or model.n_heads) < model.n_heads
    )
    assert (config.d_shared > 0) == (model.d_shared > 0)
    assert (config.shared_mix, config.qk_norm) == (model.shared_mix, model.qk_norm)


def small(name: str) -> Transformer:
    torch.manual_seed(0)
    return Transformer(MODELS[name].config(shrink=50, exact=False))


def test_glam_has_geglu_and_experts_in_every_second_block():
    config = small("glam-64b-64e").config
    assert config.activation == "geglu"
    assert [config.experts_of(layer) for layer in range(4)] == [0, 64, 0, 64]


def test_pr_moe_is_a_pyramid_whose_experts_are_mixed_with_a_residual_block():
    model = small("deepspeed-1.3b-pr-moe-64-128")
    experts = [block.mlp.experts.n_experts for block in model.blocks[1::2]]
    assert experts == sorted(experts) and (experts[0], experts[-1]) == (64, 128)
    layer = model.blocks[1].mlp
    assert layer.mix.weight.shape == (2, model.config.d_model) and layer.mix.bias.shape == (2,)
    assert layer.shared.d_ff == layer.experts.d_ff
    assert MODELS["deepspeed-1.3b-pr-moe-64-128"].experts[1::2] == (64,) * 10 + (128,) * 2


def test_arctic_has_a_dense_block_beside_its_experts():
    layer = small("arctic").blocks[0].mlp
    assert layer.shared.d_ff > layer.experts.d_ff
    assert layer.mix is None


def test_deepseek_begins_dense_shares_an_expert_and_chooses_by_a_bias():
    model = small("deepseek-v3")
    assert [model.config.is_moe(layer) for layer in range(3)] == [False, True, True]
    layer = model.blocks[1].mlp
    assert layer.shared.d_ff == layer.experts.d_ff
    assert layer.router.bias.shape == (256,) and "score=sigmoid" in repr(layer.router)


def test_qwen1_5_moe_has_a_gate_for_its_shared_expert():
    model = small("qwen1.5-moe-a2.7b")
    assert model.blocks[0].mlp.mix.weight.shape == (1, model.config.d_model)


def test_a_model_of_full_size_keeps_every_size():
    config = MODELS["gpt-oss-20b"].config()
    assert (config.d_model, config.n_heads, config.kv_heads, config.d_head) == (2880, 64, 8, 64)
    assert config.windows == (128, None) and config.sinks and config.bias
    assert (config.yarn.factor, config.yarn.original_length) == (32, 4096)
    assert not config.yarn.truncate
    assert config.router_options == {"logit_bias": True}
    halved = MODELS["gpt-oss-20b"].config(shrink=2)
    assert (halved.d_model, halved.n_layers, halved.n_experts) == (1440, 12, 32)


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("deepseek-v3", "multi-head latent attention"),
        ("switch-c", "an encoder"),
        ("lstm-moe-131072", "LSTMs"),
        ("minimax-text-01", "lightning attention"),
        ("qwen3-next-80b-a3b", "gated delta rules"),
        ("dbrx", "LayerNorm"),
    ],
)
def test_a_model_that_can_not_be_built_is_refused_with_what_is_lacking(name, lacking):
    with pytest.raises(ValueError, match=f"of {name} Transformer lacks .*{lacking}"):
        MODELS[name].config()
    assert lacking in MODELS[name].lacks


def test_a_shrink_that_would_enlarge_is_refused():
    with pytest.raises(ValueError, match="shrink=0.5 must be 1 or more"):
        MODELS["mixtral-8x7b"].config(shrink=0.5)


# ------------------------------------------------------------------------------ parts and the cache


@each
def test_flops_of_a_token_are_twice_its_active_weights_but_for_small_things(name):
    model = MODELS[name]
    seen = [p for p in model.parts() if p.name != "embedding"]
    active = sum(p.places * p.k * max(p.weights, p.reads) for p in seen)
    assert 0.99 < cost.flops(model) / 2 / active < 1.06


def test_the_cache_of_latent_attention_is_its_compressed_features():
    """70 KB a token in bfloat16, of all 61 blocks."""
    assert cost.memory(MODELS["deepseek-v3"], batch=1, context=1).cache == 61 * (512 + 64) * 2


def test_linear_attention_caches_nothing_more_for_more_tokens():
    model = MODELS["minimax-text-01"]
    assert cost.memory(model, context=1).cache == 10 * 2 * 8 * 128 * 2


def test_an_encoder_decoder_attends_in_three_ways():
    places = [p.places for p in MODELS["switch-c"].parts() if p.name == "attention"]
    assert places == [15, 15, 15]


# ------------------------------------------------------------------------ the table, its sources


def test_every_value_has_a_row_with_its_source():
    given = {(row["model"], row["field"]) for row in rows()}
    assert {name for name, _ in given} == set(NAMES)
    for model in MODELS.values():
        for field in dataclasses.fields(model):
            default = field.default is not dataclasses.MISSING and field.default
            if field.name not in ("name", "sources") and getattr(model, field.name) != default:
                assert (model.name, field.name) in given, (model.name, field.name)
                assert model.sources[field.name].words


def test_models_stand_in_order_of_their_release():
    dates = [model.released for model in MODELS.values()]
    assert dates == sorted(dates)
    assert all(re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", date) for date in dates)
    assert all(re.fullmatch(r"[a-z0-9.]+(-[a-z0-9.]+)*", name) for name in NAMES)


HEADER = "model,field,value,kind,source\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("x,d_modell,4,paper,a\n", "line 2 of .*field='d_modell' is no field of Model"),
        ("x,d_model,four,paper,a\n", "d_model='four' can't be read"),
        ("x,tied,maybe,paper,a\n", "tied='maybe' can't be read"),
        ("x,experts,8*,paper,a\n", "experts='8\\*' can't be read"),
        ("x,d_model,4,hearsay,a\n", "kind='hearsay' is not of"),
        ("x,d_model,4,paper,\n", "or no source"),
        ("x,k,1,paper,a\nx,k,1,paper,a\n", "line 3 of .*k of 'x' was given before"),
        ("x,k,1,paper,a\n", "'x' lacks activation, balance, d_ff"),
    ],
)
def test_a_row_that_makes_no_sense_is_named(line, said, tmp_path):
    file = tmp_path / "models.csv"
    file.write_text(HEADER + line)
    with pytest.raises(ValueError, match=said):
        read(file)


def test_experts_of_too_few_blocks_are_refused():
    with pytest.raises(ValueError, match="those of 2 blocks, not of n_layers=32"):
        dataclasses.replace(MODELS["mixtral-8x7b"], experts=(8, 8))


def test_the_table_has_a_row_for_each_model_by_date():
    shown = table()
    assert list(shown.index) == NAMES
    mixtral = shown.loc["mixtral-8x7b"]
    assert (mixtral.total, mixtral.active, mixtral.experts, mixtral.k) == (46.7, 12.88, 8, 2)
    assert (mixtral.width, mixtral.released, mixtral.said_total) == (3.5, "2023-12", 46.7)


def test_without_pandas_the_table_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .moe_ref\[course\]"):
        table()


def test_an_unknown_model_is_answered_with_the_nearest_name():
    with pytest.raises(KeyError, match="model='mixtral-8x7' is none of .* mean 'mixtral-8x7b'"):
        MODELS["mixtral-8x7"]


def test_a_printed_model_says_its_size_in_one_line():
    said = "Model('gpt-oss-20b', OpenAI 2025-08: 20.91B parameters, 4.19B active)"
    assert repr(MODELS["gpt-oss-20b"]) == said
