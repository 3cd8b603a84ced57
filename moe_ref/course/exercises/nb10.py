"""Exercise checks of notebook 10: counting from a configuration, reading it, what is active."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ...catalog import MODELS
from .grading import Case, grade, predict

# The released config.json of DeepSeekMoE-16B, as far as it decides the count.
DEEPSEEK_MOE_16B = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "first_k_dense_replace": 1,
    "intermediate_size": 10944,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "n_shared_experts": 2,
    "tie_word_embeddings": False,
}


def count_parameters(attempt: Callable) -> None:
    """Exercise of 10: count_parameters(config) -> (total, active), both tables counted."""

    def cases() -> Iterator[Case]:
        small = DEEPSEEK_MOE_16B | {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1}
        small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 7}
        small |= {"n_routed_experts": 5, "num_experts_per_tok": 1, "moe_intermediate_size": 2}
        plain = small | {"first_k_dense_replace": 0, "n_shared_experts": 0}
        every_one = "all experts are stored, num_experts_per_tok of them are active"
        for rule, change in (
            (every_one, {}),
            (_HEADS, {"num_key_value_heads": 1}),
            (every_one, {"num_experts_per_tok": 2}),
            (_SHARED, {"n_shared_experts": 1}),
            (_LEADING, {"first_k_dense_replace": 1, "num_hidden_layers": 3}),
            (_TIED, {"tie_word_embeddings": True}),
        ):
            yield rule, {"config": plain | change}
        yield "it all holds together", {"config": DEEPSEEK_MOE_16B}

    def unlike(mistake: str) -> Callable[..., bool]:
        """A rule is broken if the answer is what this mistake gives."""

        def test(given: tuple[int, int], config: Mapping[str, Any]) -> bool:
            wrong = _count(config, mistake)
            return wrong == _count(config) or tuple(given) != wrong

        return test

    rules = {rule: unlike(mistake) for mistake, rule in _MISTAKES.items()}
    grade(attempt, _count, cases(), rules=rules)


_HEADS = "keys and values have num_key_value_heads heads, each as wide as a query's"
_SHARED = "every token visits all n_shared_experts, each as wide as a routed expert"
_LEADING = "the first first_k_dense_replace blocks have one FFN of intermediate_size, no router"
_TIED = "tied tables are one table: it counts once"
_MISTAKES = {
    "heads": _HEADS,
    "shared idle": _SHARED,
    "shared narrow": _SHARED,
    "leading": _LEADING,
    "tied": _TIED,
    "untied": "tables that are not tied are two",
    "router": "an MoE block has a router: a row of hidden_size weights for each routed expert",
    "norms": "there are two norms in each block, and one after the last",
    "matrices": "a SwiGLU has three matrices: gate, up and down",
    "all active": "a token visits num_experts_per_tok of the routed experts, not all",
}


def _count(config: Mapping[str, Any], mistake: str = "") -> tuple[int, int]:
    """Total and active parameters; with a mistake, what those who make it get."""
    c, wide = config, config["hidden_size"]
    head = wide // c["num_attention_heads"]
    heads = c["num_attention_heads" if mistake == "heads" else "num_key_value_heads"]
    one_ffn = (2 if mistake == "matrices" else 3) * wide
    tables = 1 if c["tie_word_embeddings"] else 2
    tables = {"tied": 2, "untied": 1}.get(mistake, tables)
    total = active = tables * c["vocab_size"] * wide + (wide if mistake != "norms" else 0)
    for layer in range(c["num_hidden_layers"]):
        everyone = 2 * wide * (wide + heads * head) + (2 * wide if mistake != "norms" else 0)
        stored = visited = 0
        if layer < c["first_k_dense_replace"] and mistake != "leading":
            everyone += one_ffn * c["intermediate_size"]
        else:
            expert = one_ffn * c["moe_intermediate_size"]
            shared = c["n_shared_experts"] * expert
            if mistake == "shared narrow":
                shared = min(shared, expert)
            if mistake != "router":
                everyone += wide * c["n_routed_experts"]
            stored = c["n_routed_experts"] * expert + shared
            visited = c["num_experts_per_tok"] * expert + shared
            if mistake == "shared idle":
                visited -= shared
            if mistake == "all active":
                visited = stored
        total, active = total + everyone + stored, active + everyone + visited
    return total, active


def moe_settings(attempt: Callable) -> None:
    """Bug of 10: moe_settings(settings) -> (n_experts, k, d_ff of an expert, renormalize)."""

    def specification(settings: Mapping[str, Any]) -> tuple[int, int, int, bool]:
        theirs = "num_local_experts" if settings["model_type"] == "mixtral" else "num_experts"
        width = "intermediate_size"
        if "moe_intermediate_size" in settings:
            width = "moe_intermediate_size"
        always = settings["model_type"] == "mixtral"
        renormalize = always or settings.get("norm_topk_prob", False)
        return settings[theirs], settings["num_experts_per_tok"], settings[width], renormalize

    def cases() -> Iterator[Case]:
        width = (
            "an expert of the Qwen models has moe_intermediate_size; the other is a dense block's"
        )
        silent = "where OLMoE and Qwen do not say norm_topk_prob, it is False"
        said = "norm_topk_prob decides, where it is said"
        always = "Mixtral has no norm_topk_prob, and always divides by the sum"
        qwen = {"model_type": "qwen3_moe", "intermediate_size": 6144, "num_experts": 128}
        qwen |= {"moe_intermediate_size": 768, "num_experts_per_tok": 8}
        older = {"model_type": "qwen2_moe", "intermediate_size": 5632, "num_experts": 60}
        older |= {"moe_intermediate_size": 1408, "num_experts_per_tok": 4}
        olmoe = {"model_type": "olmoe", "intermediate_size": 1024, "num_experts": 64}
        olmoe |= {"num_experts_per_tok": 8}
        mixtral = {"model_type": "mixtral", "intermediate_size": 14336, "num_local_experts": 8}
        mixtral |= {"num_experts_per_tok": 2}
        for rule, settings in (
            (width, qwen | {"norm_topk_prob": True}),
            (width, older | {"norm_topk_prob": True}),
            (silent, olmoe),
            (silent, qwen),
            (said, older | {"norm_topk_prob": False}),
            (said, olmoe | {"norm_topk_prob": True}),
            (always, mixtral),
        ):
            yield rule, {"settings": settings}

    grade(attempt, specification, cases(), kind="bug")


def share_of_experts(guess: tuple[float, float] | None) -> None:
    """Guess of 10: percent of gpt-oss-120b in its experts: of all parameters, of the active."""

    def truth() -> tuple[float, float]:
        model = MODELS["gpt-oss-120b"]
        (part,) = (part for part in model.parts() if part.name == "experts")
        held = part.weights * part.places
        total, active = held * part.n_experts / model.total, held * part.k / model.active
        return round(100 * total, 1), round(100 * active, 1)

    predict(
        guess,
        truth,
        5,
        "A token leaves 124 of the 128 experts of each block alone. Attention and the two tables "
        "are small beside all experts, and not beside four.",
    )
