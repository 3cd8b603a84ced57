"""Drawings of the block, the feed-forward network in it, and the MoE layer in its place."""

import numpy as np
from matplotlib.patches import Rectangle

from ..._validate import check_choice
from ...ffn import ACTIVATIONS
from .drawing import DENSE, FAINT, FFN, LINE, ROUTER, Board, listed, shortened


def transformer_block(moe: bool = False) -> None:
    """A pre-norm transformer block, with a dense FFN or with an MoE layer in its place."""
    part, name = ("an MoE layer", "MoE layer") if moe else ("an FFN", "FFN")
    title = f"A block adds to its input what attention, then what {part} makes of it"
    board = Board(title, 8.8, 2.35 if moe else 1.8)
    top, low = 0.35, 1.5 if moe else 1.25
    start, first, second, out = 0.5, 4.0, 7.95, 8.5
    board.note((0.36, top), "$x$", size=13)
    board.note((0.36, top + 0.32), "[tokens,\nd_model]", size=8)
    board.arrow((start, top), (first - 0.12, top))
    board.arrow((first + 0.12, top), (second - 0.12, top))
    board.arrow((second + 0.12, top), (out, top))
    board.note((2.4, top - 0.16), "residual: the input goes on unchanged", size=8.5)
    for left, end in ((0.95, first), (4.4, second)):
        board.arrow((left, top), (left, low), (left + 0.2, low))
        board.box((left + 0.5, low), "norm", width=0.6)
        board.plus((end, top))
    board.arrow((1.75, low), (2.05, low))
    board.box((2.7, low), "attention", width=1.3, colour=DENSE)
    board.arrow((3.35, low), (first, low), (first, top + 0.12))
    board.note((2.7, low + 0.38), "mixes tokens; dense: each token\nuses all weights", size=8)
    if moe:
        _small_layer(board, 6.5, low)
        board.arrow((5.2, low), (5.57, low))
        board.arrow((7.48, low), (second, low), (second, top + 0.12))
    else:
        board.arrow((5.2, low), (5.65, low))
        board.box((6.3, low), "FFN", width=1.3, colour=FFN)
        board.arrow((6.95, low), (second, low), (second, top + 0.12))
        board.note(
            (6.3, low + 0.38), "each token by itself; dense:\neach token uses all weights", size=8
        )
    inside = (
        "the router sends each token to a few of the experts, here 2 of 4; the others don't run"
    )
    board.show("x -> norm -> attention -> added to x (residual)",
               f"that sum -> norm -> {name} -> added to that sum (residual)",
               "attention: mixes tokens; dense: each token uses all its weights",
               f"MoE layer: {inside}" if moe else
               "FFN: each token by itself; dense: each token uses all its weights")  # fmt: skip


def _small_layer(board: Board, x: float, y: float) -> None:
    """A MoE layer as a part of something larger: router, four experts, two of them used."""
    board.frame((x - 1.05, y - 0.75), 2.15, 1.55, "MoE layer")
    board.box((x - 0.58, y), "router", width=0.7, height=0.34, colour=ROUTER)
    for e in range(4):
        used, at = e in (1, 3), (x + 0.3, y - 0.38 + 0.3 * e)
        board.expert(at, e, used=used, width=0.76, height=0.24, size=8)
        if used:
            board.arrow((x - 0.23, y), (x - 0.09, at[1]))
            board.arrow((x + 0.68, at[1]), (x + 0.82, y + 0.08 * np.sign(at[1] - y)), head=False)
    board.plus((x + 0.86, y))


def ffn(activation: str = "swiglu") -> None:
    """The feed-forward block: two matrices around an activation, or three with a gate.

    Args:
        activation: "relu", "gelu" or "silu"; with a gate "swiglu", "geglu" or
            "clipped_swiglu".

    Raises:
        ValueError: if the activation is unknown.
    """
    check_choice("activation", activation, ACTIVATIONS)
    acts = {"swiglu": "SiLU", "geglu": "GELU", "clipped_swiglu": "clipped SiLU"}
    acts |= {"silu": "SiLU", "gelu": "GELU", "relu": "ReLU"}
    (_gated if ACTIVATIONS[activation][0] else _ungated)(acts[activation])


def _gated(act: str) -> None:
    title = f"Three matrices: {act} of the gate says how much of each hidden feature passes"
    board = Board(title, 8.2, 2.35)
    y, gate, up = 1.1, 0.55, 1.65
    _vector(board, (0.5, y), 4, "$x$", "d_model")
    for name, at in (("gate", gate), ("up", up)):
        board.arrow((0.62, y), (0.95, y), (0.95, at), (1.3, at))
        board.box((1.7, at), f"$W_{{\\rm {name}}}$", width=0.8, colour=FFN)
        board.arrow((2.1, at), (2.58, at))
        _vector(board, (2.7, at), 6, "", "d_ff")
    board.arrow((2.82, gate), (3.3, gate))
    board.box((3.65, gate), act, width=0.7)
    board.arrow((4.0, gate), (4.5, gate), (4.5, y - 0.12))
    board.arrow((2.82, up), (4.5, up), (4.5, y + 0.12))
    board.plus((4.5, y), "×")
    board.note((3.62, y), "multiplied number\nby number", size=8.5)
    _down(board, y)
    board.show("x [d_model] -> W_gate -> gate [d_ff]; x -> W_up -> up [d_ff]",
               f"{act}(gate) times up, number by number -> hidden [d_ff]",
               "hidden -> W_down -> y [d_model]")  # fmt: skip


def _ungated(act: str) -> None:
    board = Board(f"Two matrices: up to more features, {act} of each, and down again", 8.2, 1.3)
    y = 0.6
    _vector(board, (0.5, y), 4, "$x$", "d_model")
    board.arrow((0.62, y), (1.3, y))
    board.box((1.7, y), "$W_{\\rm up}$", width=0.8, colour=FFN)
    board.arrow((2.1, y), (2.58, y))
    _vector(board, (2.7, y), 6, "", "d_ff")
    board.arrow((2.82, y), (4.1, y))
    board.box((4.45, y), act, width=0.7)
    _down(board, y)
    board.show(f"x [d_model] -> W_up -> hidden [d_ff] -> {act} -> [d_ff] -> W_down -> y [d_model]")


def _down(board: Board, y: float) -> None:
    """From what is hidden to the output."""
    board.arrow((4.8 if y < 1 else 4.62, y), (5.28, y))
    _vector(board, (5.4, y), 6, "", "d_ff")
    board.arrow((5.52, y), (6.0, y))
    board.box((6.42, y), "$W_{\\rm down}$", width=0.84, colour=FFN)
    board.arrow((6.84, y), (7.38, y))
    _vector(board, (7.5, y), 4, "$y$", "d_model")


def _vector(board: Board, at: tuple[float, float], cells: int, name: str, size: str) -> None:
    """The features of one token, as a column of cells."""
    side = 0.12
    for i in range(cells):
        corner = (at[0] - side, at[1] + (i - cells / 2) * side)
        board.axes.add_patch(Rectangle(corner, 2 * side, side, facecolor="white", edgecolor=LINE,
                                       linewidth=0.8, zorder=2))  # fmt: skip
    if name:
        board.note((at[0], at[1] - cells / 2 * side - 0.16), name, size=12)
    board.note((at[0], at[1] + cells / 2 * side + 0.12), size, size=8)


def moe_layer(n_experts: int = 4, k: int = 2) -> None:
    """One token through an MoE layer: scored, sent to k experts, their outputs summed by weight.

    Of more than six experts, the first four and the last are drawn.
    """
    shown = shortened(n_experts)
    drawn = [e for e in shown if e is not None]
    many = k if n_experts == len(drawn) else min(k, 2)
    used = sorted(sorted(drawn, key=lambda e: (e % 2 == 0, e))[:many])
    title = f"A token runs through {k} of {n_experts} experts; their outputs are summed by weight"
    board = Board(title, 8.8, 0.62 + 0.4 * len(shown))
    middle = 0.5 + 0.2 * (len(shown) - 1)
    board.token((0.35, middle), 0, radius=0.16)
    board.note((0.35, middle + 0.3), "token", size=8.5)
    board.arrow((0.51, middle), (0.95, middle))
    board.box((1.4, middle), "router\n$W x$", width=0.9, height=0.6, colour=ROUTER)
    for x, words in ((2.75, "scores"), (4.0, f"top {k}"), (5.2, "experts"), (6.5, "times weight")):
        board.note((x, 0.14), words, size=8.5, weight="bold")
    for row, e in enumerate(shown):
        y = 0.5 + 0.4 * row
        if e is None:
            rest = n_experts - len(drawn)
            board.note((5.2, y), f"⋮  {rest} more, {k - len(used)} of them chosen", size=8.5)
        else:
            _row(board, e, y, middle, e in used)
    board.plus((7.5, middle))
    board.arrow((7.62, middle), (8.1, middle))
    board.note((8.25, middle), "$y$", size=13)
    board.show(f"token -> router (W x) -> a score for each of {n_experts} experts -> the top {k}",
               f"token -> {listed([f'expert {e}' for e in used])}"
               + f" and {k - len(used)} not drawn" * (k > len(used)),
               "each output times its weight g, which comes from its score; summed -> y",
               f"not run for this token: {n_experts - k} of {n_experts} experts")  # fmt: skip


def _row(board: Board, e: int, y: float, middle: float, used: bool) -> None:
    """One expert in the layer: its score, and if chosen the token that enters, and the weight."""
    length = 0.75 - 0.08 * (e % 3) if used else 0.3 - 0.06 * (e % 3)
    board.arrow((1.85, middle), (2.35, y), head=False, linewidth=0.8, color=FAINT)
    board.axes.add_patch(Rectangle((2.4, y - 0.09), length, 0.18, edgecolor=LINE, linewidth=0.8,
                                   facecolor=ROUTER if used else "white", zorder=2))  # fmt: skip
    board.expert((5.2, y), e, used=used, width=1.0, height=0.28)
    if not used:
        return
    board.arrow((2.45 + length, y), (3.85, y), linestyle=(0, (3, 2)), linewidth=0.9)
    board.token((4.0, y), 0)
    board.arrow((4.13, y), (4.7, y))
    board.arrow((5.7, y), (6.2, y))
    board.note((6.5, y), f"$\\times\\;g_{{{e}}}$", size=11)
    board.arrow((6.8, y), (7.39, middle + 0.07 * float(np.sign(y - middle))))
