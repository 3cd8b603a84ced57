"""Published models through the years: their parameters, and traits that come and go."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from statistics import median
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MultipleLocator, NullFormatter

from .figure import COLOURS, STYLE, canvas, legend, look, number, painted, plot, show, wrapped

# Share of the parameters that is active, from the sparsest models on.
CLASSES = {"below 3 %": 0.03, "3 to 10 %": 0.10, "10 to 20 %": 0.20, "20 % and more": np.inf}
Trait = Sequence[float] | Sequence[str]


def history(models: Mapping[str, tuple[str, float, float]], *, title: str) -> None:
    """Models from the oldest down to the newest, each from its active to its total parameters.

    Args:
        models: by name the release ("2023-12"), all parameters, and the active ones.
        title: the finding, in words.

    Raises:
        ValueError: if there are no models.
    """
    if not models:
        raise ValueError("models={} has none to draw")
    rows = sorted((date, name, total, active) for name, (date, total, active) in models.items())
    axes = plot(title, "parameters (logarithmic)", "", size=(8.2, 1.3 + 0.19 * len(rows)))
    for row, (_, _, total, active) in enumerate(rows):
        colour, _, marker, _ = look(_class(active / total))
        axes.plot((active, total), (row, row), color=colour, linewidth=1.6, zorder=2)
        axes.plot(active, row, marker, color=colour, markerfacecolor="white", ms=5.5, zorder=3)
        axes.plot(total, row, marker, color=colour, ms=5.5, zorder=3)
        axes.annotate(_share(active, total), (total, row), (7, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    _years(axes, [date[:4] for date, *_ in rows])
    axes.set_yticks(range(len(rows)), [f"{name}  {date}" for date, name, *_ in rows], fontsize=8)
    axes.set(xscale="log", ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlim(axes.get_xlim()[0], axes.get_xlim()[1] * 2.2)  # room for the last share
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 1)))
    axes.grid(axis="y", visible=False)
    _explain(axes)
    show(painted(axes), "hollow: active; filled: all; at the end: active / all",
         *_rows_in_words(rows))  # fmt: skip


def traits(
    dates: Sequence[str], panels: Mapping[str, Trait], *, title: str, log: Sequence[str] = ()
) -> None:
    """A small chart for each trait of the same models, all over the same years.

    Args:
        dates: when each model was released ("2023-12").
        panels: by name a number or a word for each model; a NaN is left out.
        title: the finding, in words.
        log: names of the panels whose numbers are drawn on a logarithmic axis.

    Raises:
        ValueError: if a panel has not one value for each date.
    """
    for name, values in panels.items():
        if len(values) != len(dates):
            raise ValueError(f"panels[{name!r}] has {len(values)} values for {len(dates)} dates")
    down = -(-len(panels) // 2)
    drawn = canvas(title, size=(8.8, 0.5 + 1.55 * down))
    with rc_context(STYLE):
        grid = drawn.subplots(down, 2, sharex=True, squeeze=False).ravel()
    at = np.array([int(date[:4]) + (int(date[5:7]) - 0.5) / 12 for date in dates])
    for i, (axes, (name, values)) in enumerate(zip(grid, panels.items(), strict=False)):
        axes.set_title(name, fontsize=9, loc="left")
        axes.plot(at, _heights(axes, values), "o", color=COLOURS[0], ms=6, alpha=0.5)
        axes.tick_params(labelsize=8, labelbottom=i >= len(panels) - 2)
        if name in log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 2)))
            axes.yaxis.set_minor_formatter(NullFormatter())
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    grid[0].xaxis.set_major_locator(MultipleLocator(1))
    show(drawn, *(f"{name}: {_by_year(dates, values)}" for name, values in panels.items()))


def _class(share: float) -> int:
    return next(i for i, most in enumerate(CLASSES.values()) if share < most)


def _share(active: float, total: float) -> str:
    return f"{number(100 * active / total, 2)} %"


def _years(axes: Axes, years: Sequence[str]) -> None:
    """Every second year on a grey ground."""
    start = 0
    for i, (_, members) in enumerate(groupby(years)):
        length = len(list(members))
        if i % 2:
            axes.axhspan(start - 0.5, start + length - 0.5, color="#F0F0F0", zorder=0)
        start += length


def _explain(axes: Axes) -> None:
    for i, name in enumerate(CLASSES):
        colour, _, marker, _ = look(i)
        axes.add_line(Line2D([], [], color=colour, marker=marker, label=f"active: {name}"))
    legend(axes)


def _rows_in_words(rows: Sequence[tuple[str, str, float, float]]) -> Iterator[str]:
    for year, members in groupby(rows, key=lambda row: row[0][:4]):
        said = [
            f"{name} {number(active)} of {number(total)} ({_share(active, total)})"
            for _, name, total, active in members
        ]
        yield from wrapped([f"{year}: {said[0]}", *said[1:]], 135)


def _heights(axes: Axes, values: Trait) -> Sequence[float]:
    """Where the values stand; words one above the other, the commonest lowest."""
    if not isinstance(values[0], str):
        return [float(value) for value in values]
    words = [word for word, _ in Counter(map(str, values)).most_common()]
    axes.set_yticks(range(len(words)), words)
    axes.set_ylim(-0.6, len(words) - 0.4)
    return [words.index(str(value)) for value in values]


def _by_year(dates: Sequence[str], values: Trait) -> str:
    found = defaultdict(list)
    for date, value in sorted(zip((date[:4] for date in dates), values), key=lambda pair: pair[0]):
        if value == value:  # no NaN
            found[date].append(value)
    return "; ".join(f"{year} {_summary(members)}" for year, members in found.items())


def _summary(values: Sequence[Any]) -> str:
    """How often each word occurs, or the median and the ends of numbers."""
    if isinstance(values[0], str):
        return ", ".join(f"{word} {n}" for word, n in Counter(values).most_common())
    low, middle, high = (_figure(f(values)) for f in (min, median, max))
    return middle + f" ({low} to {high})" * (low != high)


def _figure(value: float) -> str:
    """Whole numbers whole, others to three digits."""
    return number(value, 3 if value % 1 else 7)
