"""What a cell shows: a picture, and the same in words."""

import base64
import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.typing import ColorType
from numpy.typing import ArrayLike

# The Okabe-Ito palette, made to be told apart with any kind of colour vision.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999"]
HATCHES = ["", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "---"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
DASHES = ["-", "--", ":", "-."]
STYLE: Any = {
    "figure.dpi": 110,
    "figure.facecolor": "white",  # opaque: the words stay black on white in a dark theme too
    "savefig.facecolor": "white",
    "font.size": 10,
    "hatch.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "figure.constrained_layout.use": True,
}
HEADING: Any = {"fontsize": 11, "fontweight": "bold"}


@dataclass(frozen=True, repr=False)
class Figure:
    """A picture and its words: what a notebook displays as one output with two forms.

    The words are its `text/plain`: what a terminal prints, what nbval compares, and what
    says the same to readers who cannot see the picture.

    Args:
        text: the title, then the data, in a few lines.
        drawn: the picture.
    """

    text: str
    drawn: Canvas

    def __repr__(self) -> str:
        return self.text

    @property
    def png(self) -> bytes:
        """The picture as a PNG, the same bytes each time."""
        file = io.BytesIO()
        with rc_context(STYLE):
            self.drawn.savefig(file, format="png", bbox_inches="tight", pad_inches=0.12,
                               metadata={"Software": None})  # fmt: skip
        return file.getvalue()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": self.text, "image/png": base64.b64encode(self.png).decode("ascii")}


def show(drawn: Canvas, *lines: str) -> None:
    """Display a picture whose words are its title and these lines."""
    from IPython.display import display  # here: without matplotlib, that is what is named missing

    title = " ".join(drawn.get_suptitle().split())
    display(Figure("\n".join([f"Figure: {title}", *filter(None, lines)]), drawn))


def canvas(title: str, *, size: tuple[float, float]) -> Canvas:
    """An empty picture, its title wrapped to its width in inches."""
    with rc_context(STYLE):
        drawn = Canvas(figsize=size)
        FigureCanvasAgg(drawn)
        wrapped = "\n".join(textwrap.wrap(title, int(size[0] * 11.5)))
        drawn.suptitle(wrapped, x=0.01, ha="left", parse_math="$\\" in title, **HEADING)
    return drawn


def plot(title: str, x: str, y: str, *, size: tuple[float, float]) -> Axes:
    """Empty axes in a picture of this size, with their names."""
    drawn = canvas(title, size=size)
    with rc_context(STYLE):
        return drawn.subplots(subplot_kw={"xlabel": x, "ylabel": y})


def legend(axes: Axes, markerscale: float = 1) -> None:
    """The names of all that has a label, below the axes, where they cover nothing."""
    drawn, (handles, names) = painted(axes), axes.get_legend_handles_labels()
    width, height = drawn.get_size_inches()
    columns = max(1, min(len(names), int(width / (0.6 + 0.085 * max(map(len, names))))))
    drawn.set_size_inches(width, height + 0.22 * math.ceil(len(names) / columns))
    drawn.legend(handles, names, loc="outside lower left", ncols=columns, frameon=False,
                 markerscale=markerscale)  # fmt: skip


def painted(axes: Axes) -> Canvas:
    """The picture that holds these axes."""
    assert isinstance(axes.figure, Canvas)
    return axes.figure


def look(number: int) -> tuple[str, str, str, str]:
    """Colour, hatch, marker and dashes of series or expert `number`, 32 different ones.

    The colours come round after eight, with the next hatch, marker and dashes.
    """
    row, column = divmod(number, len(COLOURS))
    marker, dash = MARKERS[(column + row) % len(MARKERS)], DASHES[(column + row) % len(DASHES)]
    return COLOURS[column], HATCHES[(column + row) % len(HATCHES)], marker, dash


def ink(colour: ColorType) -> str:
    """Black or white, whichever stands out more on `colour`."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.4 else "black"


def array(values: ArrayLike) -> np.ndarray:
    """These numbers, of a tensor too, as float64."""
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=float)


def visible(token: str) -> str:
    """White space as signs that can be seen."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


# ------------------------------------------------------------------------- numbers in words


def places(values: ArrayLike, digits: int) -> int:
    """Decimal places at which the largest of these numbers has `digits` significant digits.

    None is negative, so that whole numbers stay whole; `digits` of 0 asks for whole numbers.
    """
    sizes = np.abs(array(values))
    largest = sizes[np.isfinite(sizes)].max(initial=0)
    if not (digits and largest):
        return 0
    exponent = math.floor(math.log10(float(f"{largest:.{digits - 1}e}")))
    return max(0, digits - 1 - exponent)


def number(
    value: float, digits: int = 3, decimals: int | None = None, missing: str = "none"
) -> str:
    """A number in words: at most `digits` significant digits, and at most `decimals` decimals."""
    value = float(value)
    if math.isnan(value):
        return missing
    if math.isinf(value):
        return "infinity" if value > 0 else "-infinity"
    if decimals is not None:
        value = round(value, decimals)
    if digits:
        value = float(f"{value:.{digits - 1}e}")
    if value == 0:  # never -0
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4 or exponent >= 15:
        return f"{value:.{max(digits, 3)}g}"
    for size, name in ((12, " trillion"), (9, " billion"), (6, " million")):
        if exponent >= size:
            return f"{value / 10**size:.{max(digits, 3)}g}{name}"
    return (
        f"{value:,.{max(0, 12 - exponent)}f}".rstrip("0").rstrip(".")
        if value % 1
        else f"{value:,.0f}"
    )


def numbers(values: ArrayLike, digits: int = 3, like: ArrayLike | None = None) -> list[str]:
    """These numbers in words, all to the same decimal place: that of the largest of `like`."""
    decimals = places(values if like is None else like, digits)
    return [number(value, digits, decimals) for value in array(values).ravel()]


def thinned(length: int, most: int = 8) -> list[int]:
    """The indices of at most `most` points, the first and the last among them."""
    if length <= most:
        return list(range(length))
    return sorted({round(i * (length - 1) / (most - 1)) for i in range(most)})


def wrapped(parts: Sequence[str], width: int = 96) -> Iterator[str]:
    """Parts joined by commas, broken into lines between parts."""
    line = ""
    for part in parts:
        if line and len(line) + len(part) > width:
            yield line + ","
            line = "  "
        line += (", " if line.strip() else "") + part
    yield line
