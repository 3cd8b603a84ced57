"""Drawings of what happens: how a router decides, and how a router left alone collapses."""

from .drawing import FFN, PLAIN, ROUTER, Board

# Boxes of the router's pipeline: name, what it does, who does it.
STEPS = {
    "logits": ("W x", "all but hash"),
    "noise": ("+ noise", "Shazeer; Switch\non x; in training"),
    "scores": ("softmax\nor sigmoid", "sigmoid:\nDeepSeek-V3"),
    "bias": ("+ bias", "DeepSeek-V3"),
    "mask": ("groups: $-\\infty$", "DeepSeek-V3"),
    "top k": ("top k", "of experts, per token;\nexpert choice: of tokens"),
}


def router_pipeline() -> None:
    """From a token to experts and weights: what each step does, and which router does it."""
    board = Board("One pipeline, of which each router uses some steps", 9.0, 2.6)
    xs, y, low = [1.25, 2.5, 3.75, 5.1, 6.3, 7.55], 0.85, 1.95
    board.token((0.3, y), 0, radius=0.16)
    board.note((0.3, y + 0.3), "x", size=9)
    board.arrow((0.46, y), (xs[0] - 0.45, y))
    for (name, (does, who)), x, after in zip(STEPS.items(), xs, [*xs[1:], 8.65]):
        board.box(
            (x, y), does, width=0.9, height=0.44, colour=ROUTER if name == "scores" else PLAIN
        )
        board.note((x, y - 0.6), name, size=9, weight="bold")
        board.note((x, y - 0.4), who, size=7.5)
        board.arrow((x + 0.45, y), (after - 0.45, y))
    board.note((8.22, y), "experts", ha="left", weight="bold")
    board.note((5.7, y + 0.4), "for the choice alone", size=8)
    board.arrow((xs[2], y + 0.22), (xs[2], low), (4.6, low))
    board.note((4.1, low - 0.14), "scores", size=8)
    board.box((5.25, low), "the scores of\nthe chosen", width=1.3, height=0.44, colour=ROUTER)
    board.arrow((xs[5], y + 0.22), (xs[5], 1.45), (5.25, 1.45), (5.25, low - 0.22))
    board.arrow((5.9, low), (6.5, low))
    board.box((7.15, low), "divide by sum,\ntimes scale", width=1.3, height=0.44)
    board.note(
        (7.15, low + 0.42), "divide: Mixtral, GShard; not Switch\nscale: DeepSeek-V3", size=7.5
    )
    board.arrow((7.8, low), (8.2, low))
    board.note((8.22, low), "weights", ha="left", weight="bold")
    board.show("x -> W x (logits) -> + noise (Shazeer; Switch on x; in training)",
               "logits -> softmax, or sigmoid (DeepSeek-V3) -> scores",
               "choice: scores -> + bias -> -infinity for all but the best groups (DeepSeek-V3)",
               "then top k: experts for each token; in expert choice, tokens for each expert",
               "weights: scores of the chosen, without bias",
               "-> divided by their sum (Mixtral, GShard; not Switch) -> times scale (DeepSeek-V3)",
               "hash: none of this; a table gives the expert, and the weight is 1")  # fmt: skip


BUSY = [
    "chosen by\nmore tokens",
    "more gradient",
    "a better expert",
    "a higher score\nfrom the router",
]
IDLE = ["chosen by\nfewer tokens", "less gradient", "left behind", "a lower score\nfrom the router"]


def feedback_loop() -> None:
    """How a router collapses: who is ahead gets further ahead, who is behind falls back."""
    board = Board("Collapse feeds itself: an expert that is ahead gets further ahead", 8.8, 2.3)
    _cycle(board, 0.15, BUSY, 0)
    _cycle(board, 4.55, IDLE, 1)
    board.show("an expert that is ahead: " + _around(BUSY), "another expert: " + _around(IDLE))


def _cycle(board: Board, left: float, steps: list[str], expert: int) -> None:
    """Four steps clockwise around an expert."""
    near, far, top, low = left + 0.85, left + 3.25, 0.45, 1.85
    for at, words in zip(((near, top), (far, top), (far, low), (near, low)), steps):
        board.box(at, words, width=1.5, height=0.54, colour=FFN if expert == 0 else PLAIN)
    board.arrow((near + 0.75, top), (far - 0.75, top))
    board.arrow((far, top + 0.27), (far, low - 0.27))
    board.arrow((far - 0.75, low), (near + 0.75, low))
    board.arrow((near, low - 0.27), (near, top + 0.27))
    board.expert(((near + far) / 2, (top + low) / 2), expert, used=expert == 0)


def _around(steps: list[str]) -> str:
    words = [step.replace("\n", " ") for step in steps]
    return " -> ".join([*words, words[0]])
