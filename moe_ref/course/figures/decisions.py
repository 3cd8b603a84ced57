"""Routing decisions: who visits whom, where rows go, and experts in running text."""

from collections.abc import Sequence

from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from ...routing import Routing
from .figure import (
    COLOURS,
    array,
    ink,
    legend,
    look,
    number,
    painted,
    plot,
    show,
    thinned,
    visible,
    wrapped,
)

CHOICES = "osDhp8Hd"  # shapes with room for a number
OUTLINES = ["none", "-", "--", ":"]  # of the experts that share a colour


def routing(decision: Routing, tokens: Sequence[str], *, title: str, digits: int = 3) -> None:
    """The routing matrix: a row for each token, a column for each expert, a disc where they meet.

    The area of a disc is the slot's weight, which is also written in it; the light squares behind
    are the scores of all experts. A padded or dropped token has no disc.
    """
    scores = decision.scores.detach().cpu().numpy()
    n_tokens, n_experts = scores.shape
    axes = plot(title, "expert", "token", size=(2.4 + 0.62 * n_experts, 1.2 + 0.42 * n_tokens))
    axes.imshow(scores, cmap="Greys", vmin=0, vmax=2.2, aspect="auto")
    for slot in range(decision.experts.shape[1]):
        served = (decision.experts[:, slot] < n_experts).nonzero()[:, 0].tolist()
        experts = decision.experts[served, slot].tolist()
        weights = decision.weights[served, slot].tolist()
        colour = COLOURS[slot % len(COLOURS)]
        areas = [250 + 500 * weight for weight in weights]
        axes.scatter(experts, served, s=areas, color=colour, marker=CHOICES[slot % len(CHOICES)],
                     label=f"choice {slot + 1}")  # fmt: skip
        for expert, token, weight in zip(experts, served, weights, strict=True):
            axes.text(expert, token, f"{weight:.2f}", ha="center", va="center", fontsize=7.5,
                      color=ink(colour), fontweight="bold")  # fmt: skip
    axes.grid(visible=False)
    axes.set_xticks(range(n_experts))
    axes.set_yticks(range(n_tokens), [visible(token) for token in tokens])
    legend(axes, markerscale=0.5)
    show(painted(axes), *_routes(decision, tokens, digits))


def _routes(decision: Routing, tokens: Sequence[str], digits: int) -> list[str]:
    """Each token with the experts that serve it and their weights."""
    words = []
    for i in thinned(len(tokens), 24):
        pairs = zip(decision.experts[i].tolist(), decision.weights[i].tolist())
        visits = [
            f"{e} ({number(w, digits, digits - 1)})" for e, w in pairs if e < decision.n_experts
        ]
        words.append(f"{visible(tokens[i])} -> {', '.join(visits) or 'nobody'}")
    return ["token -> expert (weight)", *words]


def permutation(decision: Routing, order: ArrayLike, *, title: str) -> None:
    """Slots in the order of their tokens at the left, joined to rows in the order of experts.

    `order` is the slot of each row. A box holds the number of its expert; a slot that nobody serves
    has a dash and no row. Line and box of an expert share a colour; the number tells apart experts
    whose colour is the same.
    """
    experts = decision.experts.flatten().tolist()
    slots, n_experts = decision.experts.shape[1], decision.n_experts
    rows = array(order).astype(int).tolist()
    axes = plot(title, "", "", size=(5.8, 1.1 + 0.27 * len(experts)))
    for row, slot in enumerate(rows):
        colour, _, _, dash = look(experts[slot])
        axes.plot([0, 1], [slot, row], dash, zorder=1, color=colour)
    boxes = [(0, slot, expert) for slot, expert in enumerate(experts)]
    for x, y, expert in boxes + [(1, row, experts[slot]) for row, slot in enumerate(rows)]:
        nobody = expert == n_experts
        colour = "white" if nobody else look(expert)[0]
        axes.text(x, y, "–" if nobody else str(expert), ha="center", va="center", fontsize=8.5,
                  color=ink(colour), bbox={"fc": colour, "ec": "black", "pad": 3})  # fmt: skip
    names = [f"token {i // slots}, slot {i % slots}" for i in range(len(experts))]
    axes.set_yticks(range(len(experts)), names)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(rows)), [f"row {i}" for i in range(len(rows))])
    axes.set(xlim=(-0.1, 1.1), ylim=(len(experts) - 0.4, -0.6), xticks=[])
    axes.grid(visible=False)
    words = [f"row {row}: {names[slot]} -> {experts[slot]}" for row, slot in enumerate(rows)]
    idle = [name for name, expert in zip(names, experts) if expert == n_experts]
    show(painted(axes), "row: token and slot -> expert", *words,
         *(f"no row: {name} -> nobody" for name in idle))  # fmt: skip


def text(tokens: Sequence[str], experts: Sequence[int], *, title: str, width: int = 84) -> None:
    """Running text, each token on the colour of its expert, whose number stands below it.

    Colours come round after eight experts, then with an outline, after 16 with a dashed one, after
    24 with a dotted one.
    """
    boxes, column, line = [], 0.0, 0
    for token in map(visible, tokens):
        if column and column + len(token) > width:
            column, line = 0.0, line + 1
        boxes.append((token, column, line))
        column += len(token) + 0.6
    axes = plot(title, "", "", size=(8.6, 0.8 + 0.52 * (line + 1)))
    axes.set(xlim=(0, width + 4), ylim=(line + 1, -0.1))
    axes.axis("off")
    for (token, left, row), expert in zip(boxes, experts, strict=True):
        colour, outline = look(expert)[0], OUTLINES[expert // len(COLOURS) % len(OUTLINES)]
        box = (left, row + 0.05), len(token) + 0.3, 0.5
        axes.add_patch(Rectangle(*box, facecolor=colour, alpha=0.35, edgecolor="none"))
        axes.add_patch(Rectangle(*box, fill=False, linestyle=outline, linewidth=1.2))
        middle = left + len(token) / 2 + 0.15
        axes.text(middle, row + 0.3, token, ha="center", va="center", fontsize=8,
                  family="monospace", parse_math=False)  # fmt: skip
        axes.text(middle, row + 0.73, str(expert), ha="center", va="center", fontsize=6.5)
    words = [f"{visible(token)} {expert}" for token, expert in zip(tokens, experts)]
    show(painted(axes), "token and its expert:", *wrapped(words))
