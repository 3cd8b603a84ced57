"""Drawings of released models: a pyramid of experts with a residual layer, a safetensors file."""

from collections.abc import Sequence

from .drawing import DENSE, FAINT, FFN, LINE, ROUTER, Board, listed
from .figure import COLOURS


def pr_moe(experts: Sequence[int] = (8, 16, 32, 40)) -> None:
    """DeepSpeed's PR-MoE: more experts in later blocks, and a dense block beside one expert.

    Args:
        experts: of each MoE block, from the first to the last.
    """
    board = Board("PR-MoE: a pyramid of experts, and in each block a residual layer", 8.8, 3.0)
    board.frame((0.1, 0.05), 3.5, 2.85, "pyramid")
    step = 2.3 / len(experts)
    for i, n in enumerate(experts):
        y = 2.7 - step * (i + 0.5)
        width = 0.6 + 2.0 * n / max(experts)
        board.box((2.2, y), f"{n} experts", width=max(width, 0.85), height=0.8 * step, size=8.5,
                  colour=COLOURS[4])  # fmt: skip
        board.note((0.5, y), f"block {i}", size=8.5)
    board.frame((3.8, 0.05), 4.9, 2.85, "residual layer")
    board.token((4.15, 1.5), 0, words="x")
    board.arrow((4.28, 1.5), (4.5, 1.5), (4.5, 0.8), (5.55, 0.8))
    board.arrow((4.5, 1.5), (4.5, 2.1), (4.62, 2.1))
    board.box((6.2, 0.8), "dense FFN", width=1.3, colour=FFN)
    board.box((5.05, 2.1), "router", width=0.86, height=0.34, colour=ROUTER)
    board.arrow((5.48, 2.1), (5.75, 2.1))
    board.expert((6.2, 2.1), 2)
    board.note((6.2, 2.45), "top 1, by its raw score", size=8.5)
    board.note((6.2, 0.46), "every token", size=8.5)
    board.plus((7.9, 1.5))
    board.arrow((6.85, 0.8), (7.9, 0.8), (7.9, 1.38))
    board.arrow((6.65, 2.1), (7.9, 2.1), (7.9, 1.62))
    board.note((8.12, 1.05), "times $c_1$", size=8.5, ha="left", color=LINE)
    board.note((8.12, 1.9), "times $c_0$", size=8.5, ha="left", color=LINE)
    board.arrow((4.5, 1.5), (5.25, 1.5))
    board.box((6.1, 1.5), "softmax of W x + b", width=1.7, height=0.34, colour=DENSE, size=8.5)
    board.arrow((6.95, 1.5), (7.78, 1.5), linestyle=(0, (4, 3)))
    board.note((7.35, 1.36), "c", size=8.5)
    board.arrow((8.02, 1.5), (8.4, 1.5))
    board.note((8.52, 1.5), "y")
    counts = listed([str(n) for n in experts])
    board.show(f"pyramid: {counts} experts, from the first MoE block to the last",
               "residual layer: x -> dense FFN; x -> router -> its best expert, by its raw score",
               "y = c_0 times the expert + c_1 times the dense FFN; c: a learned softmax of x",
               )  # fmt: skip


def tensor_file(header: int, tensors: Sequence[tuple[str, int, int]]) -> None:
    """What stands where in a safetensors file: a number, a header, and one tensor after another.

    Args:
        header: bytes of the header.
        tensors: name, first byte and end of each, counted from the end of the header.
    """
    chosen: list[tuple[str, int, int] | None] = list(tensors)
    if len(tensors) > 3:
        chosen = [*tensors[:2], None, tensors[-1]]
    size = 8 + header + max(end for _, _, end in tensors)
    title = f"A file of {size:,} bytes: a number, a header, then {len(tensors)} tensors"
    board = Board(title, 8.8, 1.5)
    width, y = 8.5 / (2 + len(chosen)), 0.75
    cells: list[tuple[str, str, int] | None] = [
        ("8 bytes", "length of\nthe header", 0),
        ("header", "JSON: name,\ndtype, shape, place", 8),
    ]
    start = 8 + header
    cells += [(_short(t[0]), f"{t[2] - t[1]:,} bytes", start + t[1]) if t else None for t in chosen]
    for i, cell in enumerate(cells):
        x = 0.15 + width * (i + 0.5)
        if cell is None:
            board.note((x, y), "…", size=13)
            continue
        name, what, first = cell
        board.box((x, y), what, width=width - 0.06, height=0.5, size=7.5,
                  colour=(ROUTER, DENSE, FFN)[min(i, 2)])  # fmt: skip
        board.note((x, y - 0.42), name, size=7.5)
        board.note((x - width / 2 + 0.05, y + 0.38), f"{first:,}", size=7.5, ha="left", color=FAINT)
    board.note(
        (0.15, y + 0.62), "below each part: its first byte", size=7.5, ha="left", color=FAINT
    )
    board.show(f"bytes 0 to 8: the length of the header; then {header:,} bytes of JSON",
               *(f"{t[0]}: bytes {start + t[1]:,} to {start + t[2]:,}" if t else "…"
                 for t in chosen))  # fmt: skip


def _short(name: str) -> str:
    """The last words of a tensor's name, as many as fit above its box."""
    words = name.split(".")
    while len(words) > 1 and len(".".join(words)) > 20:
        words = words[1:]
    return ".".join(words)
