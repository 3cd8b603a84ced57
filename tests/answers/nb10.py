"""Answers to the exercises of notebook 10: the right one, and plausible wrong ones."""

from typing import Any


# -------------------------------------------------------------------------------- count_parameters
def _counted(config, *, dense=None, kv="num_key_value_heads", tables=None, matrices=3, norms=2,
             router=True, shared=None, idle=False, k=None):  # fmt: skip
    c, wide = config, config["hidden_size"]
    head = wide // c["num_attention_heads"]
    dense = c["first_k_dense_replace"] if dense is None else dense
    shared = c["n_shared_experts"] if shared is None else shared
    tables = 2 - c["tie_word_embeddings"] if tables is None else tables
    moe = c["num_hidden_layers"] - dense
    attention = 2 * wide * head * (c["num_attention_heads"] + c[kv])
    always = tables * c["vocab_size"] * wide + bool(norms) * wide
    always += c["num_hidden_layers"] * (attention + norms * wide)
    always += dense * matrices * wide * c["intermediate_size"]
    always += moe * router * wide * c["n_routed_experts"]
    expert = moe * matrices * wide * c["moe_intermediate_size"]
    total = always + (c["n_routed_experts"] + shared) * expert
    k = c["num_experts_per_tok"] if k is None else k
    return total, always + (k + (0 if idle else shared)) * expert


def count_parameters(config):
    return _counted(config)


def count_parameters_as_if_all_blocks_were_moe(config):
    return _counted(config, dense=0)


def count_parameters_with_as_many_keys_as_queries(config):
    return _counted(config, kv="num_attention_heads")


def count_parameters_with_two_tables(config):
    return _counted(config, tables=2)


def count_parameters_with_one_table(config):
    return _counted(config, tables=1)


def count_parameters_of_two_matrices(config):
    return _counted(config, matrices=2)


def count_parameters_without_norms(config):
    return _counted(config, norms=0)


def count_parameters_without_routers(config):
    return _counted(config, router=False)


def count_parameters_of_one_shared_expert(config):
    return _counted(config, shared=min(1, config["n_shared_experts"]))


def count_parameters_without_shared_experts(config):
    return _counted(config, shared=0)


def count_parameters_with_idle_shared_experts(config):
    return _counted(config, idle=True)


def count_parameters_all_active(config):
    return _counted(config, k=config["n_routed_experts"])


def count_parameters_the_other_way_round(config):
    return _counted(config)[::-1]


# ------------------------------------------------------------------------------------ moe_settings
def _settings(settings, width, renormalize):
    n_experts = settings.get("num_experts") or settings["num_local_experts"]
    return n_experts, settings["num_experts_per_tok"], settings[width], renormalize


def _width(settings):
    names = "moe_intermediate_size", "intermediate_size"
    return next(name for name in names if name in settings)


def moe_settings(settings):
    default = settings["model_type"] == "mixtral"
    return _settings(settings, _width(settings), settings.get("norm_topk_prob", default))


def moe_settings_as_it_stands(settings):
    return _settings(settings, "intermediate_size", settings.get("norm_topk_prob", True))


def moe_settings_with_one_bug_mended(settings):
    return _settings(settings, _width(settings), settings.get("norm_topk_prob", True))


def moe_settings_with_the_other_bug_mended(settings):
    default = settings["model_type"] == "mixtral"
    return _settings(settings, "intermediate_size", settings.get("norm_topk_prob", default))


def moe_settings_never_by_default(settings):
    return _settings(settings, _width(settings), settings.get("norm_topk_prob", False))


def moe_settings_never_of_olmoe(settings):
    return _settings(settings, _width(settings), settings["model_type"] != "olmoe")


def moe_settings_that_asks_all_for_a_width_of_experts(settings):
    return _settings(settings, "moe_intermediate_size", settings.get("norm_topk_prob", False))


# -------------------------------------------------------------------------------- share_of_experts
def share_of_experts():
    wide, experts, k, blocks = 2880, 128, 4, 36
    expert = 3 * wide * wide + 3 * wide
    table, attention = 201088 * wide, 2 * wide * 64 * (64 + 8)
    rest = 2 * table + blocks * (attention + experts * wide)
    held = blocks * expert
    return tuple(100 * n * held / (n * held + rest) for n in (experts, k))


ANSWERS: dict[str, tuple[Any, list]] = {
    "count_parameters": (
        count_parameters,
        [
            count_parameters_as_if_all_blocks_were_moe,
            count_parameters_with_as_many_keys_as_queries,
            count_parameters_with_two_tables,
            count_parameters_with_one_table,
            count_parameters_of_two_matrices,
            count_parameters_without_norms,
            count_parameters_without_routers,
            count_parameters_of_one_shared_expert,
            count_parameters_without_shared_experts,
            count_parameters_with_idle_shared_experts,
            count_parameters_all_active,
            count_parameters_the_other_way_round,
        ],
    ),
    "moe_settings": (
        moe_settings,
        [
            moe_settings_as_it_stands,
            moe_settings_with_one_bug_mended,
            moe_settings_with_the_other_bug_mended,
            moe_settings_never_by_default,
            moe_settings_never_of_olmoe,
            moe_settings_that_asks_all_for_a_width_of_experts,
        ],
    ),
    "share_of_experts": (share_of_experts, [(98, 98), (98, 3), (50, 63), (80, 20)]),
}
