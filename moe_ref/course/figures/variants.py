"""Drawings of more that is built from experts: upcycling, patches, a gate for each task."""

from collections.abc import Sequence

from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from .drawing import DENSE, FAINT, FFN, LINE, ROUTER, Board, shortened
from .figure import array, numbers


def upcycling(n_experts: int = 4) -> None:
    """A dense block becomes an MoE block: its FFN is copied to every expert, the router is new."""
    shown = shortened(n_experts, 4)
    title = f"Upcycling: {n_experts} copies of the trained FFN, and a new router"
    board = Board(title, 8.8, 2.9)
    board.frame((0.1, 0.05), 2.3, 2.3, "trained dense block")
    board.frame((3.2, 0.05), 5.5, 2.3, "MoE block at its start")
    board.box((1.25, 0.6), "norms, attention", width=1.5, colour=DENSE)
    board.box((1.25, 1.9), "FFN", width=1.1, colour=FFN)
    board.arrow((1.25, 0.81), (1.25, 1.69))
    board.box((5.95, 0.6), "norms, attention", width=1.5, colour=DENSE)
    board.arrow((2.0, 0.6), (5.2, 0.6), linestyle=(0, (4, 3)))
    board.note((2.8, 0.46), "copied", size=8.5)
    board.arrow((5.95, 0.81), (5.95, 1.03))
    board.box((5.95, 1.2), "router", width=0.9, height=0.34, colour=ROUTER)
    board.note((6.48, 1.2), "new, at random", size=8.5, ha="left")
    xs = [5.95 + 1.3 * (i - (len(shown) - 1) / 2) for i in range(len(shown))]
    board.arrow((1.25, 2.11), (1.25, 2.65), (xs[-1], 2.65), head=False, linestyle=(0, (4, 3)))
    board.note((2.8, 2.78), "copied to every expert", size=8.5)
    for e, x in zip(shown, xs):
        if e is None:
            board.note((x, 1.9), "…", size=13)
            continue
        board.box((x, 1.9), f"expert {e} = FFN", width=1.16, colour=FFN, size=8.5)
        board.arrow((5.95, 1.37), (x, 1.69), linewidth=0.9)
        board.arrow((x, 2.65), (x, 2.11), linestyle=(0, (4, 3)))
    board.show(f"dense block -> MoE block: norms and attention copied, the FFN {n_experts} times",
               f"experts 0 to {n_experts - 1} all equal the FFN; the router is new, at random",
               "a token's weights sum to 1, so both blocks give the same output")  # fmt: skip


def patches(image: ArrayLike, patch: int) -> None:
    """An image cut into square patches, each of which becomes a token.

    Args:
        image: `[height, width]` of ink, both multiples of `patch`.
        patch: pixels along a side of a patch.

    Raises:
        ValueError: if the patches don't fill the image.
    """
    ink = array(image)
    (height, width), side = ink.shape, 2.0
    if height % patch or width % patch:
        raise ValueError(f"patch={patch} does not divide the image's {height} x {width} pixels")
    down, across = height // patch, width // patch
    tiles = ink.reshape(down, patch, across, patch).swapaxes(1, 2).reshape(-1, patch, patch)
    per_row = min(len(tiles), 8)
    size = min(0.44, 4.2 / per_row - 0.1)
    rows, step = -(-len(tiles) // per_row), size + 0.24
    title = (
        f"An image of {height} by {width} pixels becomes {len(tiles)} tokens, one for each patch"
    )
    board = Board(title, 8.8, max(2.3, 0.3 + step * rows))
    middle = 0.15 + side / 2
    board.axes.imshow(ink, cmap="Greys", extent=(0.2, 2.2, 2.15, 0.15), aspect="auto")
    for i in range(down + 1):
        board.arrow((0.2, 0.15 + side * i / down), (2.2, 0.15 + side * i / down), head=False)
    for i in range(across + 1):
        board.arrow((0.2 + side * i / across, 0.15), (0.2 + side * i / across, 2.15), head=False)
    board.arrow((2.3, middle), (2.85, middle))
    board.note((2.57, middle - 0.14), "cut", size=8.5)
    for i, tile in enumerate(tiles):
        x, y = 3.0 + (size + 0.1) * (i % per_row), middle + step * (i // per_row - rows / 2)
        board.axes.imshow(tile, cmap="Greys", vmin=ink.min(), vmax=ink.max(), aspect="auto",
                          extent=(x, x + size, y + size, y))  # fmt: skip
        frame = Rectangle((x, y), size, size, fill=False, edgecolor=LINE, linewidth=0.9)
        board.axes.add_patch(frame)
        board.note((x + size / 2, y + size + 0.1), str(i), size=7.5)
    right = 3.0 + (size + 0.1) * per_row
    board.axes.set(xlim=(0, 8.8), ylim=(max(2.3, 0.3 + step * rows), 0))
    board.arrow((right + 0.02, middle), (right + 0.35, middle))
    words = f"each: {patch * patch} numbers,\ntimes a matrix,\nplus its position"
    board.note((right + 0.42, middle), words, size=8.5, ha="left")
    means = numbers(tiles.mean(axis=(1, 2)))
    board.show(f"cut row by row into {len(tiles)} patches of {patch} x {patch} pixels; mean ink:",
               *(", ".join(means[row * across : (row + 1) * across]) for row in range(down)),
               "each patch -> times a matrix -> plus its position -> a token")  # fmt: skip


def mmoe(n_experts: int, tasks: Sequence[str]) -> None:
    """Multi-gate mixture of experts: every task weights all experts by a gate of its own."""
    shown, names = shortened(n_experts, 6), list(tasks)
    parts, step = [*shown, *names], 0.4
    title = f"Each task mixes the same {n_experts} experts by a gate of its own"
    board = Board(title, 8.8, step * len(parts) + 0.3)
    spots = [0.25 + step * i + 0.12 * (i >= len(shown)) for i in range(len(parts))]
    middle = (spots[0] + spots[-1]) / 2
    lanes = [middle + (t - (len(names) - 1) / 2) * (spots[-1] - spots[0]) / (len(names) + 0.3)
             for t in range(len(names))]  # fmt: skip
    board.note((0.3, middle), "$x$", size=13)
    board.arrow((0.45, middle), (0.9, middle), head=False)
    for part, y in zip(parts, spots):
        if part is None:
            board.note((2.1, y), "⋮", size=12)
            continue
        board.arrow((0.9, middle), (0.9, y), (1.3, y))
        if isinstance(part, int):
            board.expert((2.1, y), part, width=1.6, height=0.28)
            for lane in lanes:
                board.arrow((2.9, y), (4.9, lane), head=False, linewidth=0.8, color=FAINT)
    for name, y, lane in zip(names, spots[len(shown) :], lanes):
        board.box((2.1, y), f"gate of {name}", width=1.6, height=0.28, colour=ROUTER, size=8.5)
        board.arrow((2.9, y), (4.9, lane), linestyle=(0, (4, 3)))
        board.plus((5.0, lane))
        board.note((5.15, lane - 0.15), "sum by gate", size=8.5, ha="left")
        board.arrow((5.12, lane), (6.0, lane))
        board.box((6.4, lane), "head", width=0.8, height=0.32)
        board.arrow((6.8, lane), (7.2, lane))
        board.note((7.28, lane), name, ha="left")
    board.show(f"x -> each of {n_experts} experts, shared by all tasks; none is skipped",
               *(f"x -> gate of {name}: softmax over all experts -> sum of all outputs by gate -> "
                 f"head -> {name}" for name in names))  # fmt: skip
