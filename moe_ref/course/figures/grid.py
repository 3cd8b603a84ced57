"""Grids of numbers: white is zero, and what is large stands out."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import ArrayLike

from .figure import array, ink, number, painted, places, plot, show, thinned

# White at zero, darker and darker blue: read in grey, it is a scale of grey.
BLUES = LinearSegmentedColormap.from_list("blues", ["#FFFFFF", "#9CC9E8", "#3F8FC6", "#08306B"])
TURN = LinearSegmentedColormap.from_list(
    "turn", ["#7F2704", "#F1A35F", "#FFFFFF", "#6BAED6", "#08306B"], N=257
)


def matrix(
    values: ArrayLike,
    *,
    title: str,
    x: str,
    y: str,
    columns: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    unit: str = "",
    digits: int = 3,
) -> None:
    """A grid of numbers, white at zero and darker the further from it, each written in its cell.

    Args:
        values: `[rows, columns]`; NaN leaves its cell empty. Beyond 200 cells nothing is written.
        title: the finding, in words.
        x, y: what columns and rows are.
        columns, rows: their names; without them they are numbered from 0.
        unit: of the numbers.
        digits: significant digits of the largest; all others are written to the same decimal place.
            0: whole numbers.
    """
    grid = array(values)
    below = [str(i) for i in range(grid.shape[1])] if columns is None else list(columns)
    beside = [str(i) for i in range(grid.shape[0])] if rows is None else list(rows)
    size = (1.6 + 0.5 * grid.shape[1], 1.0 + 0.32 * grid.shape[0])
    axes = plot(title, x, y, size=(min(max(size[0], 4.6), 9.0), min(size[1], 8.0)))
    reach = np.nanmax(np.abs(grid), initial=0) or 1
    low = -reach if np.nanmin(grid, initial=0) < 0 else 0
    image = axes.imshow(grid, cmap=TURN if low else BLUES, vmin=low, vmax=reach, aspect="auto")
    axes.grid(visible=False)
    axes.set_xticks(range(len(below)), below, rotation=_slant(below, axes))
    axes.set_yticks(range(len(beside)), beside)
    decimals = places(grid, digits)
    if grid.size <= 200:
        for (row, column), value in np.ndenumerate(grid):
            written = "" if np.isnan(value) else f"{value:,.{decimals}f}"
            fill: Any = image.to_rgba(value)
            axes.text(column, row, written, ha="center", va="center", fontsize=8,
                      color=ink(fill) if value else "#999999")  # fmt: skip
    painted(axes).colorbar(image, label=unit, shrink=0.9)
    show(painted(axes), f"rows: {y or 'named'}; columns: {x}" + f"; in {unit}" * bool(unit),
         *_grid_in_words(grid, beside, below, digits))  # fmt: skip


def _slant(labels: Sequence[str], axes: Axes) -> int:
    """Degrees by which names below a grid are turned, so that long ones do not meet."""
    room = painted(axes).get_figwidth() * 0.7 / len(labels)
    return 90 if max(map(len, labels)) * 0.085 > room else 0


def _grid_in_words(
    grid: np.ndarray, rows: Sequence[str], columns: Sequence[str], digits: int
) -> Iterable[str]:
    decimals = places(grid, digits)
    filled = np.nan_to_num(grid, nan=1) != 0
    if filled.sum() <= 0.25 * filled.size and filled.sum() <= 60:
        yield "not zero:"
        for name, row, kept in zip(rows, grid, filled, strict=True):
            found = zip(columns, row, kept, strict=True)
            cells = [f"{column} {number(v, digits, decimals)}" for column, v, k in found if k]
            yield f"{name}: {', '.join(cells) or 'nothing'}"
    elif grid.size <= 200:
        yield f"columns {', '.join(columns)}"
        for name, row in zip(rows, grid, strict=True):
            yield f"{name}: {', '.join(number(v, digits, decimals) for v in row)}"
    else:
        yield f"{len(rows)} rows, {len(columns)} columns"
        for i in thinned(len(rows), 24):
            top = int(np.nanargmax(grid[i]))
            mean, most = (number(v, digits, decimals) for v in (np.nanmean(grid[i]), grid[i, top]))
            yield f"{rows[i]}: mean {mean}, largest {most} at {columns[top]}"
