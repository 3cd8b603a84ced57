"""The language of the drawings: boxes for what computes, discs for tokens, arrows for what moves.

Positions and sizes are in inches, from the top left corner. An expert is a box with its number, in
its colour; a token is a disc with a letter, in its colour. What is not used is drawn with a dashed
line; a place that holds padding is hatched.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.text import Text

from .figure import COLOURS, HEADING, canvas, ink, painted, show

# Paul Tol's light palette: fills that carry black letters, and differ from the colours of experts.
TOKENS = ["#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#AAAA00"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PLAIN, DENSE, ROUTER, FFN = "#FFFFFF", "#E8E8E8", "#FFF2CC", "#BBD7EA"
LINE, FAINT = "#333333", "#999999"
Point = tuple[float, float]
Looks = dict[str, Any]  # options of matplotlib


class Board:
    """A sheet to draw on, `width` by `height` inches, under its title."""

    def __init__(self, title: str, width: float, height: float) -> None:
        drawn = canvas(title, size=(width, height))
        head = 0.24 + 0.19 * drawn.get_suptitle().count("\n") + 0.12
        drawn.set_layout_engine("none")
        drawn.set_size_inches(width, height + head)
        drawn.suptitle(drawn.get_suptitle(), x=0.01, ha="left", y=1 - 0.05 / (height + head),
                       **HEADING)  # fmt: skip
        self.axes: Axes = drawn.add_axes((0, 0, 1, height / (height + head)))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")
        self.boxes = 0

    def show(self, *words: str) -> None:
        """Display the drawing, and in words what is drawn and how it is connected."""
        show(painted(self.axes), *words)

    def note(self, at: Point, words: str, *, size: float = 9, **looks: Any) -> Text:
        """Words at a point, which is their middle."""
        usual: Looks = {"ha": "center", "va": "center", "color": LINE, "linespacing": 1.15}
        return self.axes.text(*at, words, fontsize=size, parse_math="$" in words, **usual | looks)

    def box(
        self,
        at: Point,
        words: str,
        *,
        width: float = 1.2,
        height: float = 0.42,
        colour: str = PLAIN,
        dashed: bool = False,
        size: float = 9,
    ) -> None:
        """A box around a point, with words that fit in it."""
        corner, edge = (at[0] - width / 2, at[1] - height / 2), FAINT if dashed else LINE
        patch = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.06",
                               facecolor=colour, edgecolor=edge, zorder=2,
                               linestyle="--" if dashed else "-")  # fmt: skip
        self.axes.add_patch(patch)
        if words:
            self.boxes += 1  # a test asks by this name whether the words fit
            patch.set_gid(f"box {self.boxes}")
            color = FAINT if dashed else ink(colour)
            self.note(at, words, size=size, color=color, zorder=3, gid=f"in box {self.boxes}")

    def expert(self, at: Point, number: int, *, used: bool = True, **looks: Any) -> None:
        """The box of an expert."""
        colour = COLOURS[number % len(COLOURS)] if used else PLAIN
        usual: Looks = {"words": f"expert {number}", "width": 0.9, "height": 0.3}
        self.box(at, colour=colour, dashed=not used, **usual | looks)

    def frame(self, corner: Point, width: float, height: float, words: str = "") -> None:
        """A frame around several parts, its name at the top left in it."""
        self.axes.add_patch(Rectangle(corner, width, height, facecolor="#F7F7F7", zorder=0,
                                      edgecolor=FAINT, linewidth=1))  # fmt: skip
        self.note((corner[0] + 0.08, corner[1] + 0.14), words, ha="left", size=9, weight="bold")

    def token(self, at: Point, number: int, *, radius: float = 0.13, words: str = "") -> None:
        """The disc of a token, with its letter."""
        colour = TOKENS[number % len(TOKENS)]
        disc = Circle(at, radius, facecolor=colour, edgecolor=LINE, linewidth=0.9, zorder=3)
        self.axes.add_patch(disc)
        size = min(9, 62 * radius) / max(1, 0.62 * len(words))
        self.note(at, words or letter(number), size=size, color="black", zorder=4)

    def place(self, corner: Point, side: float, *, empty: bool = False) -> None:
        """A square that may hold a token; hatched if it holds padding or nothing."""
        hatch = "//////" if empty else ""
        self.axes.add_patch(Rectangle(corner, side, side, facecolor="white", hatch=hatch, zorder=1,
                                      edgecolor="#BBBBBB", linewidth=0.8))  # fmt: skip

    def plus(self, at: Point, sign: str = "+") -> None:
        """Where what arrives is added (or multiplied)."""
        disc = Circle(at, 0.12, facecolor=PLAIN, edgecolor=LINE, linewidth=1.1, zorder=3)
        self.axes.add_patch(disc)
        self.note(at, sign, size=11, zorder=4)

    def ring(self, at: Point, radius: float) -> None:
        """A mark around a token that came from elsewhere."""
        self.axes.add_patch(Circle(at, radius, fill=False, edgecolor=LINE, linewidth=2.2, zorder=5))

    def cross(self, at: Point, radius: float) -> None:
        """A mark through a token that nobody serves."""
        x, y = at
        for side in (-radius, radius):
            self.axes.plot((x - side, x + side), (y - radius, y + radius), color=LINE,
                           linewidth=1.6, zorder=3.5)  # fmt: skip

    def arrow(self, *points: Point, head: bool = True, **looks: Any) -> None:
        """A line through points, square at its corners, with a head at its end."""
        looks = Looks(color=LINE, linewidth=1.2, zorder=1.5) | looks
        if len(points) > 2:
            xs, ys = zip(*points[:-1])
            self.axes.plot(xs, ys, solid_capstyle="butt", solid_joinstyle="miter", **looks)
        style = "-|>" if head else "-"
        self.axes.add_patch(FancyArrowPatch(points[-2], points[-1], arrowstyle=style, shrinkA=0,
                                            shrinkB=0, mutation_scale=10, **looks))  # fmt: skip


def letter(number: int) -> str:
    """A name for a token: A to Z, then AA, AB and on."""
    row, column = divmod(number, len(LETTERS))
    return (LETTERS[row - 1] if row else "") + LETTERS[column]


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def shortened(number: int, most: int = 6) -> list[int | None]:
    """Which of `number` experts a drawing has room for: the first, a gap (None), the last."""
    return [*range(number)] if number <= most else [*range(most - 2), None, number - 1]
