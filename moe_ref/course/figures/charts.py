"""Charts of numbers: lines, bars, stacked bars and a roofline."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import ArrayLike

from .figure import array, legend, look, number, numbers, painted, places, plot, show, thinned

# Behind words that a line may cross.
PLATE = {"fc": "white", "ec": "none", "pad": 0.6, "alpha": 0.75}


def lines(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    title: str,
    x: str,
    y: str,
    log: str = "",
    marks: bool = True,
    vertical: Mapping[str, float] | None = None,
    level: Mapping[str, float] | None = None,
    spread: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    digits: int = 3,
) -> None:
    """One line for each name, through its (xs, ys).

    Args:
        series: xs and ys by name; NaN leaves a gap.
        title: the finding, in words.
        x, y: names of the axes, with their units.
        log: the axes ("x", "y", "xy") that are logarithmic.
        marks: draw a mark at each point.
        vertical: named upright lines, each at its x.
        level: named level lines, each at its y.
        spread: a band around the line of a name, (low, high) at each of its xs.
        digits: significant digits of the words.
    """
    axes = plot(title, x, y, size=(6.6, 3.7))
    bands = {name: np.where(np.isnan(array(series[name][1])), np.nan, [array(e) for e in ends])
             for name, ends in (spread or {}).items()}  # fmt: skip
    for i, (name, (xs, ys)) in enumerate(series.items()):
        colour, _, marker, dash = look(i)
        axes.plot(array(xs), array(ys), dash, color=colour, ms=5, label=name,
                  marker=marker if marks else "")  # fmt: skip
        if name in bands:
            axes.fill_between(array(xs), *bands[name], color=colour, alpha=0.2, linewidth=0)
    _scale(axes, log)
    _upright(axes, vertical or {})
    _level(axes, level or {})
    if len(series) + len(level or {}) > 1:
        legend(axes)
    show(painted(axes), *_lines_in_words(series, bands, x, y, log, digits),
         *_named_in_words(vertical, f"{x} ="), *_named_in_words(level, f"{y} ="))  # fmt: skip


def bars(
    values: Mapping[str, ArrayLike],
    labels: Sequence[str],
    *,
    title: str,
    y: str,
    spread: Mapping[str, ArrayLike] | None = None,
    level: Mapping[str, float] | None = None,
    missing: str = "never",
    digits: int = 3,
) -> None:
    """Grouped bars: for each label one bar of every named series, its value written on top.

    Args:
        values: the heights by name, one for each label; NaN draws no bar but the word `missing`.
        labels: what stands below the bars.
        title: the finding, in words.
        y: name of the axis, with its unit.
        spread: error bars of a name: half their height, or the pair (lows, highs).
        level: named level lines, each at its y.
        missing, digits: the word for NaN, and the significant digits of the numbers.
    """
    axes, width = plot(title, "", y, size=_bars_size(values, labels)), 0.8 / len(values)
    heights = {name: array(column).reshape(-1) for name, column in values.items()}
    ends = {name: _ends(heights[name], array(half)) for name, half in (spread or {}).items()}
    everything = np.concatenate(list(heights.values()))
    words = {
        name: [missing if word == "none" else word for word in numbers(column, digits, everything)]
        for name, column in heights.items()
    }
    for i, (name, column) in enumerate(heights.items()):
        colour, hatch, _, _ = look(i)
        at = np.arange(len(labels)) + (i - (len(values) - 1) / 2) * width
        axes.bar(at, column, width * 0.92, label=name, color=colour, hatch=hatch,
                 edgecolor="white", linewidth=0.8)  # fmt: skip
        if name in ends:
            axes.errorbar(at, column, np.abs(ends[name] - column), fmt="none", ecolor="black",
                          capsize=3, lw=1.1)  # fmt: skip
        _write_on_bars(axes, at, column, words[name], ends.get(name))
    axes.set_xticks(range(len(labels)), labels)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    if (everything[np.isfinite(everything)] < 0).any():
        axes.axhline(0, color="black", linewidth=0.8)
    _level(axes, level or {})
    if len(values) + len(level or {}) > 1:
        legend(axes)
    show(painted(axes), f"y: {y}",
         *(_bars_in_words(name, labels, words[name], ends.get(name), digits) for name in values),
         *_named_in_words(level, f"{y} ="))  # fmt: skip


def stack(
    parts: Mapping[str, ArrayLike],
    labels: Sequence[str],
    *,
    title: str,
    x: str = "share in percent",
    digits: int = 3,
) -> None:
    """One horizontal bar for each label, cut into named parts, each part's value written in it."""
    axes = plot(title, x, "", size=(7.0, 1.0 + 0.5 * len(labels)))
    start = np.zeros(len(labels))
    lengths = {name: array(values) for name, values in parts.items()}
    total = np.sum(list(lengths.values()), axis=0)
    words = {name: numbers(values, digits, total) for name, values in lengths.items()}
    for i, (name, values) in enumerate(lengths.items()):
        colour, hatch, _, _ = look(i)
        axes.barh(labels, values, left=start, label=name, color=colour, hatch=hatch,
                  edgecolor="white")  # fmt: skip
        for row, (left, length) in enumerate(zip(start, values, strict=True)):
            if length > 0.06 * total.max():  # else the number would not fit
                axes.text(left + length / 2, row, words[name][row], ha="center", va="center",
                          fontsize=9, bbox={"fc": "white", "ec": "none", "pad": 1.5})  # fmt: skip
        start = start + values
    axes.invert_yaxis()
    axes.grid(visible=False)
    legend(axes)
    rows = (", ".join(f"{name} {words[name][i]}" for name in parts) for i in range(len(labels)))
    show(painted(axes), f"x: {x}", *(f"{name}: {row}" for name, row in zip(labels, rows)))


def roofline(
    points: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    flops: float,
    bandwidth: float,
    title: str,
    digits: int = 3,
) -> None:
    """Measured rates under the machine's limit: min(flops, intensity * bandwidth).

    `points` holds (intensities in FLOP per byte, rates in FLOP/s) by name; `flops` is in FLOP/s,
    `bandwidth` in bytes/s. Source: Williams, Waterman and Patterson 2009.
    """
    x, y, ridge = "arithmetic intensity in FLOP per byte", "GFLOP/s", flops / bandwidth
    axes = plot(title, x, y, size=(6.6, 3.9))
    reach = np.concatenate([array(xs) for xs, _ in points.values()] + [[ridge]])
    span = np.geomspace(reach.min() / 1.5, reach.max() * 1.5, 200)
    axes.plot(span, np.minimum(flops, span * bandwidth) / 1e9, color="black", label="limit")
    rates = {name: (xs, array(ys) / 1e9) for name, (xs, ys) in points.items()}
    for i, (name, (xs, ys)) in enumerate(rates.items()):
        colour, _, marker, _ = look(i)
        axes.plot(array(xs), ys, marker, color=colour, ms=6, label=name)
    axes.axvline(ridge, color="black", linewidth=1, linestyle=(0, (4, 3)))
    for name, offset, side in (("memory-bound", -6, "right"), ("compute-bound", 6, "left")):
        axes.annotate(name, (ridge, 0.94), xycoords=("data", "axes fraction"), ha=side,
                      xytext=(offset, 0), textcoords="offset points", fontsize=9)  # fmt: skip
    _scale(axes, "xy")
    axes.set_ylim(top=2 * flops / 1e9)  # room for the words above the limit
    legend(axes)
    limit = f"limit: rises to {number(flops / 1e9, digits)} GFLOP/s at {number(ridge, digits)}"
    show(painted(axes), *_lines_in_words(rates, {}, x, y, "xy", digits), f"{limit} FLOP per byte")


def _bars_size(values: Mapping[str, ArrayLike], labels: Sequence[str]) -> tuple[float, float]:
    longest = max(max(map(len, str(label).split("\n"))) for label in labels)
    each = max(0.9, 0.5 * len(values), 0.085 * longest + 0.15)
    return min(max(5.0, len(labels) * each), 11.0), 3.3


def _ends(heights: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """The lower and the upper ends of error bars, [2, labels]."""
    ends = spread if spread.ndim == 2 else np.stack([heights - spread, heights + spread])
    return np.where(np.isnan(heights), np.nan, ends)


def _write_on_bars(
    axes: Axes, at: np.ndarray, heights: np.ndarray, words: list[str], ends: np.ndarray | None
) -> None:
    for i, (place, height, word) in enumerate(zip(at, heights, words, strict=True)):
        gap = np.isnan(height)
        below = not gap and height < 0
        edge = 0 if gap else height if ends is None else ends[0 if below else 1][i]
        axes.annotate(word, (place, edge), ha="center", va="top" if below else "bottom",
                      xytext=(0, -2 if below else 2), textcoords="offset points", fontsize=8,
                      rotation=90 if gap else 0, bbox=PLATE)  # fmt: skip


def _level(axes: Axes, level: Mapping[str, float]) -> None:
    for (name, value), dash in zip(level.items(), cycle(((4, 3), (1, 2), (8, 2)))):
        axes.axhline(value, color="black", linewidth=1.2, linestyle=(0, dash), label=name)


def _upright(axes: Axes, vertical: Mapping[str, float]) -> None:
    for name, value in vertical.items():
        axes.axvline(value, color="black", linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(name, (value, 1), xycoords=("data", "axes fraction"), xytext=(4, -12),
                      textcoords="offset points", fontsize=9)  # fmt: skip


def _scale(axes: Axes, log: str) -> None:
    """Logarithmic axes with plain numbers where they stay short."""
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if name in log:
            base = 2 if name == "x" and not _decades(axes) else 10
            getattr(axes, f"set_{name}scale")("log", base=base)
            if name == "y":  # a label at 1, 2 and 5: less than one decade may be in sight
                axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
            axis.set_minor_formatter(NullFormatter())


def _decades(axes: Axes) -> bool:
    """Whether every x is a power of ten."""
    powers = np.log10(np.concatenate([array(line.get_xdata()) for line in axes.get_lines()]))
    return np.allclose(powers, powers.round())


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


# --------------------------------------------------------------------------------- in words


def _lines_in_words(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    bands: Mapping[str, np.ndarray],
    x: str,
    y: str,
    log: str,
    digits: int,
) -> Iterable[str]:
    everything = np.concatenate([array(ys).ravel() for _, ys in series.values()])
    decimals = None if "y" in log else places(everything, digits)
    kinds = {axis: " (logarithmic)" * (axis in log) for axis in "xy"}
    yield f"x: {x}{kinds['x']}; y: {y}{kinds['y']}"
    before = None
    for name, (xs, ys) in series.items():
        at = thinned(len(array(xs)))
        where = [number(v, 6 if v % 1 == 0 else 3) for v in array(xs)[at]]
        if where != before:
            yield f"x at {', '.join(where)}"
        before = where
        values = [number(v, digits, decimals) for v in array(ys)[at]]
        if name in bands:
            low, high = ([number(v, digits, decimals) for v in band[at]] for band in bands[name])
            values = [_between(*ends) for ends in zip(values, low, high)]
        yield f"{name or 'y'}: {', '.join(values)}"


def _bars_in_words(
    name: str, labels: Sequence[str], words: list[str], ends: np.ndarray | None, digits: int
) -> str:
    parts = [f"{' '.join(str(label).split())} = {word}" for label, word in zip(labels, words)]
    if ends is not None:
        lows, highs = (numbers(edge, digits, ends) for edge in ends)
        parts = [_between(*part) for part in zip(parts, lows, highs)]
    return f"{name or 'height'}: {', '.join(parts)}"


def _between(value: str, low: str, high: str) -> str:
    """A value with its spread; one that is missing has none."""
    return value if "none" in (low, high) else f"{value} ({low} to {high})"


def _named_in_words(named: Mapping[str, float] | None, kind: str) -> list[str]:
    return [f"line {name}: {kind} {number(value)}" for name, value in (named or {}).items()]
