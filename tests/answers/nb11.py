"""Answers to the exercises of notebook 11: the right one, and plausible wrong ones."""

from typing import Any


# ---------------------------------------------------------------------------------- touched_by_two
def touched_by_two(shares, others, k, tokens):
    half = tokens // 2
    return sum(1 - (1 - k * p) ** half * (1 - k * q) ** half for p, q in zip(shares, others))


def touched_by_two_in_the_mean(shares, others, k, tokens):
    return sum(1 - (1 - k * (p + q) / 2) ** tokens for p, q in zip(shares, others))


def touched_by_two_added_up(shares, others, k, tokens):
    half = tokens // 2
    return sum(2 - (1 - k * p) ** half - (1 - k * q) ** half for p, q in zip(shares, others))


def touched_by_two_of_one_kind(shares, others, k, tokens):
    return sum(1 - (1 - k * p) ** tokens for p in shares)


def touched_by_two_without_k(shares, others, k, tokens):
    half = tokens // 2
    return sum(1 - (1 - p) ** half * (1 - q) ** half for p, q in zip(shares, others))


def touched_by_two_equally_popular(shares, others, k, tokens):
    return len(shares) * (1 - (1 - k / len(shares)) ** tokens)


# --------------------------------------------------------------------------------------- bandwidth
def bandwidth(n_experts, k, tokens, expert_bytes, seconds):
    return n_experts * (1 - (1 - k / n_experts) ** tokens) * expert_bytes / seconds


def bandwidth_as_it_stands(n_experts, k, tokens, expert_bytes, seconds):
    return min(tokens * k, n_experts) * expert_bytes / seconds


def bandwidth_of_every_choice(n_experts, k, tokens, expert_bytes, seconds):
    return tokens * k * expert_bytes / seconds


def bandwidth_of_all_experts(n_experts, k, tokens, expert_bytes, seconds):
    return n_experts * expert_bytes / seconds


def bandwidth_of_single_choices(n_experts, k, tokens, expert_bytes, seconds):
    """As if a token could choose one expert twice."""
    return n_experts * (1 - (1 - 1 / n_experts) ** (tokens * k)) * expert_bytes / seconds


# ------------------------------------------------------------------------------------- nine_in_ten
def nine_in_ten():
    return 35.7, 72.5


ANSWERS: dict[str, tuple[Any, list]] = {
    "touched_by_two": (
        touched_by_two,
        [
            touched_by_two_in_the_mean,
            touched_by_two_added_up,
            touched_by_two_of_one_kind,
            touched_by_two_without_k,
            touched_by_two_equally_popular,
        ],
    ),
    "bandwidth": (
        bandwidth,
        [
            bandwidth_as_it_stands,
            bandwidth_of_every_choice,
            bandwidth_of_all_experts,
            bandwidth_of_single_choices,
        ],
    ),
    "nine_in_ten": (nine_in_ten, [(16, 32), (14.4, 28.8), (36, 36), (116, 231)]),
}
