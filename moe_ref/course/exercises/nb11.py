"""Exercise checks of notebook 11: experts that a batch touches, and what is read."""

import math
from collections.abc import Callable, Iterator, Sequence

from .grading import Case, grade, predict


def touched_by_two(attempt: Callable) -> None:
    """Exercise of 11: touched_by_two(shares, others, k, tokens) -> experts touched."""

    def specification(
        shares: Sequence[float], others: Sequence[float], k: int, tokens: int
    ) -> float:
        total = 0.0
        for p, q in zip(shares, others, strict=True):
            missed = 1.0
            for t in range(tokens):
                missed *= 1 - k * (p if t % 2 else q)
            total += 1 - missed
        return total

    def cases() -> Iterator[Case]:
        even = [0.25] * 4
        rule = "a token visits expert i with chance k * share, and an expert counts once"
        yield rule, {"shares": even, "others": even, "k": 1, "tokens": 2}
        yield rule, {"shares": even, "others": even, "k": 2, "tokens": 6}
        rule = "an expert that no token chooses is not touched"
        yield rule, {"shares": [0.5, 0.5, 0, 0], "others": [0.5, 0.5, 0, 0], "k": 2, "tokens": 8}
        rule = "half of the tokens are of each kind, and each kind has shares of its own"
        yield rule, {"shares": [1.0, 0, 0], "others": [0, 0.5, 0.5], "k": 1, "tokens": 2}
        yield rule, {"shares": [0.5, 0.3, 0.2], "others": [0.1, 0.4, 0.5], "k": 2, "tokens": 4}
        rule = "k = n_experts touches all of them with the first token"
        yield rule, {"shares": even, "others": even, "k": 4, "tokens": 2}
        rule = "no token touches no expert"
        yield rule, {"shares": even, "others": even, "k": 2, "tokens": 0}

    grade(attempt, specification, cases())


def bandwidth(attempt: Callable) -> None:
    """Bug of 11: bandwidth(n_experts, k, tokens, expert_bytes, seconds) -> bytes a second."""

    def specification(
        n_experts: int, k: int, tokens: int, expert_bytes: float, seconds: float
    ) -> float:
        missed = math.prod(1 - k / n_experts for _ in range(tokens))
        return n_experts * (1 - missed) * expert_bytes / seconds

    def cases() -> Iterator[Case]:
        one = "one token touches k experts"
        yield one, dict(n_experts=8, k=2, tokens=1, expert_bytes=1.0, seconds=1.0)
        twice = "an expert that two tokens choose is read once"
        for n, k, tokens in ((8, 2, 4), (128, 8, 16), (4, 1, 6)):
            yield twice, dict(n_experts=n, k=k, tokens=tokens, expert_bytes=1.0, seconds=1.0)
        every = "no more than all experts are read"
        yield every, dict(n_experts=8, k=2, tokens=500, expert_bytes=1.0, seconds=1.0)
        yield every, dict(n_experts=4, k=4, tokens=3, expert_bytes=1.0, seconds=1.0)
        rate = "bytes of what is touched, over the seconds of the step"
        yield rate, dict(n_experts=128, k=8, tokens=32, expert_bytes=9.4e6, seconds=4e-4)

    grade(attempt, specification, cases(), kind="bug")


def nine_in_ten(guess: tuple[float, float] | None) -> None:
    """Guess of 11: tokens that touch nine experts in ten, of 128 and of 256, top-8."""

    def truth() -> tuple[float, float]:
        few, many = (math.log(0.1) / math.log(1 - 8 / n) for n in (128, 256))
        return round(few, 1), round(many, 1)

    predict(
        guess,
        truth,
        4,
        "ln 0.1 / ln(1 - k/E): about 2.3 E/k tokens. Twice as many experts for the same k take "
        "twice as many tokens.",
    )
