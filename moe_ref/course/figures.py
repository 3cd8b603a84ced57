"""Every plot of the course. The only file that imports matplotlib.

Each function draws one kind of figure and shows it. `title` says what the figure shows, as a
finding. All of them read in grey and for the colour-blind: what colour tells is told a second time
by a marker, a hatch, a number or a place.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import ArrayLike

from ..routing import Routing

# The Okabe-Ito palette, made to be told apart with any kind of colour vision.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999"]
HATCHES = ["", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "---"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
DASHES = ["-", "--", ":", "-."]
STYLE: Any = {
    "figure.dpi": 110,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def lines(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    title: str,
    x: str,
    y: str,
    log: str = "",
    marks: bool = True,
    vertical: Mapping[str, float] | None = None,
) -> None:
    """One line for each name, through its (xs, ys).

    `x` and `y` name the axes with their units; `log` holds the axes ("x", "y", "xy") that are
    logarithmic; `vertical` draws a named upright line at each value.
    """
    axes = _axes(title, x, y, size=(6.4, 3.6))
    looks = zip(cycle(COLOURS), cycle(MARKERS), cycle(DASHES), strict=False)
    for (name, (xs, ys)), (colour, marker, dash) in zip(series.items(), looks, strict=False):
        shape = marker if marks else ""
        axes.plot(_array(xs), _array(ys), dash, color=colour, marker=shape, ms=5, label=name)
    _scale(axes, log)
    for name, value in (vertical or {}).items():
        axes.axvline(value, color="black", linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(name, (value, 1), xycoords=("data", "axes fraction"), xytext=(4, -12),
                      textcoords="offset points", fontsize=9)  # fmt: skip
    if len(series) > 1:
        axes.legend()
    plt.show()


def bars(values: Mapping[str, ArrayLike], labels: Sequence[str], *, title: str, y: str) -> None:
    """Grouped bars: for each label one bar of every named series, its value written on top."""
    axes = _axes(title, "", y, size=(max(5.0, len(labels) * max(0.9, 0.5 * len(values))), 3.2))
    width = 0.8 / len(values)
    looks = zip(cycle(COLOURS), cycle(HATCHES), strict=False)
    for i, ((name, heights), (colour, hatch)) in enumerate(
        zip(values.items(), looks, strict=False)
    ):
        at = np.arange(len(labels)) + (i - (len(values) - 1) / 2) * width
        drawn = axes.bar(at, _array(heights), width * 0.92, label=name, color=colour, hatch=hatch,
                         edgecolor="white")  # fmt: skip
        axes.bar_label(drawn, fmt=_short, fontsize=8, padding=1)
    axes.set_xticks(range(len(labels)), labels)
    axes.grid(axis="x", visible=False)
    if len(values) > 1:
        axes.legend()
    plt.show()


def stack(
    parts: Mapping[str, ArrayLike],
    labels: Sequence[str],
    *,
    title: str,
    x: str = "share in percent",
) -> None:
    """One horizontal bar for each label, cut into named parts, each part's value written in it."""
    axes = _axes(title, x, "", size=(7.0, 1.0 + 0.5 * len(labels)))
    start = np.zeros(len(labels))
    longest = np.sum([_array(values) for values in parts.values()], axis=0).max()
    looks = zip(cycle(COLOURS), cycle(HATCHES), strict=False)
    for (name, values), (colour, hatch) in zip(parts.items(), looks, strict=False):
        lengths = _array(values)
        axes.barh(labels, lengths, left=start, label=name, color=colour, hatch=hatch,
                  edgecolor="white")  # fmt: skip
        for row, (left, length) in enumerate(zip(start, lengths, strict=True)):
            if length > 0.06 * longest:  # else the number would not fit
                axes.text(left + length / 2, row, f"{length:.3g}", ha="center", va="center",
                          fontsize=9, bbox={"fc": "white", "ec": "none", "pad": 1.5})  # fmt: skip
        start = start + lengths
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    plt.show()


def matrix(
    values: ArrayLike,
    *,
    title: str,
    x: str,
    y: str,
    columns: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    unit: str = "",
    digits: int = 2,
) -> None:
    """A grid of numbers, darker where larger, each written in its cell while they fit."""
    grid = _array(values)
    size = (1.6 + 0.5 * grid.shape[1], 1.0 + 0.32 * grid.shape[0])
    axes = _axes(title, x, y, size=(min(max(size[0], 4.2), 9.0), min(size[1], 8.0)))
    image = axes.imshow(grid, cmap="cividis_r", aspect="auto")
    axes.grid(visible=False)
    axes.set_xticks(range(grid.shape[1]), columns or [str(i) for i in range(grid.shape[1])])
    axes.set_yticks(range(grid.shape[0]), rows or [str(i) for i in range(grid.shape[0])])
    if grid.size <= 200:
        for (row, column), value in np.ndenumerate(grid):
            dark = value - grid.min() > 0.55 * np.ptp(grid)
            axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=8,
                      color="white" if dark else "black")  # fmt: skip
    axes.figure.colorbar(image, label=unit, shrink=0.9)
    plt.show()


def routing(decision: Routing, tokens: Sequence[str], *, title: str) -> None:
    """The routing matrix: a row for each token, a column for each expert, a disc where they meet.

    The area of a disc is the slot's weight, which is also written in it; the light squares behind
    are the scores of all experts. A padded or dropped token has no disc.
    """
    scores = decision.scores.detach().cpu().numpy()
    n_tokens, n_experts = scores.shape
    axes = _axes(title, "expert", "token", size=(2.2 + 0.62 * n_experts, 1.1 + 0.42 * n_tokens))
    axes.imshow(scores, cmap="Greys", vmin=0, vmax=2.2, aspect="auto")
    slots = decision.experts.shape[1]
    for slot in range(slots):
        served = (decision.experts[:, slot] < n_experts).nonzero()[:, 0].tolist()
        experts = decision.experts[served, slot].tolist()
        weights = decision.weights[served, slot].tolist()
        colour = COLOURS[slot % len(COLOURS)]
        areas = [250 + 500 * weight for weight in weights]
        axes.scatter(experts, served, s=areas, color=colour, marker=MARKERS[slot % len(MARKERS)],
                     label=f"choice {slot + 1}")  # fmt: skip
        for expert, token, weight in zip(experts, served, weights, strict=True):
            axes.text(expert, token, f"{weight:.2f}", ha="center", va="center", fontsize=7.5,
                      color=ink(colour), fontweight="bold")  # fmt: skip
    axes.grid(visible=False)
    axes.set_xticks(range(n_experts))
    axes.set_yticks(range(n_tokens), [_visible(token) for token in tokens])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), markerscale=0.5)
    plt.show()


def permutation(decision: Routing, order: ArrayLike, *, title: str) -> None:
    """Slots in the order of their tokens at the left, joined to rows in the order of experts.

    `order` is the slot of each row. A box holds the number of its expert; a slot that nobody serves
    has a dash and no row.
    """
    experts = decision.experts.flatten().tolist()
    slots, n_experts = decision.experts.shape[1], decision.n_experts
    rows = _array(order).astype(int).tolist()
    axes = _axes(title, "", "", size=(5.6, 1.0 + 0.27 * len(experts)))
    for row, slot in enumerate(rows):
        expert = experts[slot]
        axes.plot([0, 1], [slot, row], DASHES[expert % len(DASHES)], zorder=1,
                  color=COLOURS[expert % len(COLOURS)])  # fmt: skip
    boxes = [(0, slot, expert) for slot, expert in enumerate(experts)]
    for x, y, expert in boxes + [(1, row, experts[slot]) for row, slot in enumerate(rows)]:
        nobody = expert == n_experts
        colour = "white" if nobody else COLOURS[expert % len(COLOURS)]
        axes.text(x, y, "–" if nobody else str(expert), ha="center", va="center", fontsize=8.5,
                  color=ink(colour), bbox={"fc": colour, "ec": "black", "pad": 3})  # fmt: skip
    axes.set_yticks(range(len(experts)), [f"token {i // slots}, slot {i % slots}"
                                          for i in range(len(experts))])  # fmt: skip
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(rows)), [f"row {i}" for i in range(len(rows))])
    axes.set(xlim=(-0.1, 1.1), ylim=(len(experts) - 0.4, -0.6), xticks=[])
    axes.grid(visible=False)
    plt.show()


def text(tokens: Sequence[str], experts: Sequence[int], *, title: str, width: int = 84) -> None:
    """Running text, each token on the colour of its expert, whose number stands below it."""
    boxes, column, line = [], 0.0, 0
    for token in map(_visible, tokens):
        if column and column + len(token) > width:
            column, line = 0.0, line + 1
        boxes.append((token, column, line))
        column += len(token) + 0.6
    axes = _axes(title, "", "", size=(8.6, 0.7 + 0.52 * (line + 1)))
    axes.set(xlim=(0, width + 4), ylim=(line + 1, -0.1))
    axes.axis("off")
    for (token, left, row), expert in zip(boxes, experts, strict=True):
        colour = COLOURS[expert % len(COLOURS)]
        axes.add_patch(Rectangle((left, row + 0.05), len(token) + 0.3, 0.5, alpha=0.35,
                                     facecolor=colour, edgecolor="none"))  # fmt: skip
        middle = left + len(token) / 2 + 0.15
        axes.text(middle, row + 0.3, token, ha="center", va="center", fontsize=8,
                  family="monospace", parse_math=False)  # fmt: skip
        axes.text(middle, row + 0.73, str(expert), ha="center", va="center", fontsize=6.5)
    plt.show()


def roofline(
    points: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    flops: float,
    bandwidth: float,
    title: str,
) -> None:
    """Measured rates under the machine's limit: min(flops, intensity * bandwidth).

    `points` holds (intensities in FLOP per byte, rates in FLOP/s) by name; `flops` is in FLOP/s,
    `bandwidth` in bytes/s. Source: Williams, Waterman and Patterson 2009.
    """
    axes = _axes(title, "arithmetic intensity in FLOP per byte", "GFLOP/s", size=(6.4, 3.8))
    reach = np.concatenate([_array(xs) for xs, _ in points.values()] + [[flops / bandwidth]])
    span = np.geomspace(reach.min() / 1.5, reach.max() * 1.5, 200)
    axes.plot(span, np.minimum(flops, span * bandwidth) / 1e9, color="black", label="limit")
    looks = zip(cycle(COLOURS), cycle(MARKERS), strict=False)
    for (name, (xs, ys)), (colour, marker) in zip(points.items(), looks, strict=False):
        axes.plot(_array(xs), _array(ys) / 1e9, marker, color=colour, ms=6, label=name)
    axes.axvline(flops / bandwidth, color="black", linewidth=1, linestyle=(0, (4, 3)))
    for name, offset, side in (("memory-bound", -6, "right"), ("compute-bound", 6, "left")):
        axes.annotate(name, (flops / bandwidth, 0.94), xycoords=("data", "axes fraction"), ha=side,
                      xytext=(offset, 0), textcoords="offset points", fontsize=9)  # fmt: skip
    _scale(axes, "xy")
    axes.set_ylim(top=2 * flops / 1e9)  # room for the words above the limit
    axes.legend(loc="lower right")
    plt.show()


def ink(colour: str) -> str:
    """Black or white, whichever stands out more on `colour`."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.4 else "black"


def _axes(title: str, x: str, y: str, *, size: tuple[float, float]) -> Axes:
    plt.rcParams.update(STYLE)
    _, axes = plt.subplots(figsize=size)
    axes.set(title=title, xlabel=x, ylabel=y)
    return axes


def _scale(axes: Axes, log: str) -> None:
    """Logarithmic axes with plain numbers where they stay short."""
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if name in log:
            getattr(axes, f"set_{name}scale")("log", base=2 if name == "x" else 10)
            if name == "y":  # a label at 1, 2 and 5: less than one decade may be in sight
                axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
            axis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _array(values: ArrayLike) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=float)


def _visible(token: str) -> str:
    """White space as signs that can be seen."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
