"""Drawings of tokens on the move: the four forms of dispatch, and the places of a capacity."""

from collections.abc import Sequence

from ...routing import Routing
from .drawing import Board, letter
from .figure import COLOURS, visible, wrapped

Visits = list[tuple[int, int]]  # (token, expert), in the order of the tokens
Slots = list[tuple[int, int, int]]  # (token, expert asked for, expert that serves)
Rows = dict[int, list[int]]  # the tokens of each expert
MOST = 8  # tokens, and experts that nobody visits, in a drawing
VISITS = 18


def dispatch_forms(routing: Routing, tokens: Sequence[str]) -> None:
    """The same tokens in four forms: loop, one-hot einsum, padded bmm and sorted rows.

    Args:
        routing: the decision; its first tokens are drawn, at most eight, with at most 18 visits.
        tokens: a name for each.
    """
    names = list(tokens)[: max(1, min(MOST, VISITS // routing.experts.shape[1]))]
    visits = [(t, e) for t, row in enumerate(routing.experts[: len(names)].tolist())
              for e in row if e < routing.n_experts]  # fmt: skip
    few = range(routing.n_experts if routing.n_experts <= MOST else 0)
    rows = {e: [t for t, at in visits if at == e] for e in sorted({*few, *(e for _, e in visits)})}
    places = max(map(len, rows.values()), default=0)
    idle = routing.n_experts - len(rows)
    tall = max(0.45 + 0.22 * len(names), 0.4 + 0.3 * len(rows))
    title = f"The same {len(visits)} visits in four forms: one by one, among zeros, padded, sorted"
    board = Board(title, 9.0, 4.25 + tall)
    _names(board, 0.15, names)
    _loop(board, 0.6, visits)
    _one_hot(board, 1.8, len(names), rows, places, idle)
    _padded(board, 1.8, rows, places, idle)
    _sorted(board, 2.2 + tall, rows, len(names))
    said = [f"{letter(i)} {visible(name)}" for i, name in enumerate(names)]
    loop = [f"{letter(t)} -> {e}" for t, e in visits]
    board.show(*wrapped(said), "loop, token -> expert, one visit after the other:", *wrapped(loop),
               *_forms_in_words(rows, places, len(names), idle))  # fmt: skip


def _forms_in_words(rows: Rows, places: int, tokens: int, idle: int) -> list[str]:
    padded, real = (len(rows) + idle) * places, sum(map(len, rows.values()))
    ones = [f"{letter(t)} {e}.{c}" for e, row in rows.items() for c, t in enumerate(row)]
    spare = {e: f"+ {places - len(row)} padding" for e, row in rows.items() if len(row) < places}
    filled = [f"expert {e}: {' '.join([*map(letter, row), spare.get(e, '')]).strip()}"
              for e, row in rows.items()]  # fmt: skip
    runs = [f"{' '.join(map(letter, row))} at expert {e}" for e, row in rows.items() if row]
    return [
        f"one-hot einsum: a mask of {tokens} x {padded}, {real} ones and "
        f"{tokens * padded - real} zeros; ones at expert.place:",
        *wrapped(ones),
        f"padded bmm: {padded} rows, {padded - real} of them padding"
        + f", {idle} experts without tokens not listed" * bool(idle),
        *wrapped(filled),
        f"sorted rows: {real} rows, no padding",
        *wrapped(runs),
        "each output row, times its weight -> summed for its token",
    ]


def _names(board: Board, y: float, names: Sequence[str]) -> None:
    """Which letter stands for which token."""
    step = min(1.3, 8.6 / len(names))
    for i, name in enumerate(names):
        board.token((0.25 + step * i, y), i, radius=0.11)
        board.note((0.42 + step * i, y), visible(name), ha="left", va="center_baseline", size=8.5)


def _expert_tag(board: Board, at: tuple[float, float], expert: int, width: float) -> None:
    board.expert(at, expert, words=str(expert), width=width, height=0.2, size=7.5)


def _heading(board: Board, at: tuple[float, float], name: str, words: str) -> None:
    board.note(at, name, ha="left", weight="bold")
    board.note((at[0], at[1] + 0.18), words, ha="left", size=8.5)


def _loop(board: Board, y: float, visits: Visits) -> None:
    words = f"{len(visits)} visits one after the other; each reads all weights of its expert"
    _heading(board, (0.15, y), "1  Loop", words)
    step = min(0.6, 8.7 / max(1, len(visits)))
    for i, (token, expert) in enumerate(visits):
        x = 0.15 + step * (i + 0.5)
        board.token((x, y + 0.45), token, radius=min(0.12, 0.45 * step))
        board.arrow((x, y + 0.57), (x, y + 0.72), linewidth=0.9)
        _expert_tag(board, (x, y + 0.83), expert, 0.8 * step)


def _one_hot(board: Board, y: float, tokens: int, rows: Rows, places: int, idle: int) -> None:
    columns, left, ones = len(rows) * places, 0.5, sum(map(len, rows.values()))
    side, top = min(0.21, 5.3 / max(1, columns)), y + 0.58
    zeros = tokens * (len(rows) + idle) * places - ones
    words = f"a mask of tokens by places: {ones} ones, and {zeros} zeros to multiply by"
    _heading(board, (0.15, y), "2  One-hot einsum", words)
    for t in range(tokens):
        board.token((0.28, top + side * (t + 0.5)), t, radius=0.45 * side)
    for i, (e, row) in enumerate(rows.items()):
        start = left + i * places * side
        _expert_tag(board, (start + places * side / 2, top - 0.13), e, places * side * 0.92)
        for c in range(places):
            for t in range(tokens):
                at = (start + (c + 0.5) * side, top + (t + 0.5) * side)
                board.place((start + c * side, top + t * side), side)
                if row[c : c + 1] == [t]:
                    board.token(at, t, radius=0.44 * side, words="1")
                elif side > 0.12:
                    board.note(at, "0", size=6.5, color="#AAAAAA")
        board.arrow((start, top), (start, top + tokens * side), head=False, zorder=2)


def _padded(board: Board, y: float, rows: Rows, places: int, idle: int) -> None:
    left, side = 6.75, min(0.26, 2.1 / max(1, places))
    padding = (len(rows) + idle) * places - sum(map(len, rows.values()))
    words = f"{places} rows for each expert, {padding} of padding"
    _heading(board, (6.3, y), "3  Padded bmm", words)
    for i, (e, row) in enumerate(rows.items()):
        top = y + 0.4 + 0.3 * i
        _expert_tag(board, (left - 0.27, top + side / 2), e, 0.36)
        for c in range(places):
            board.place((left + c * side, top), side, empty=c >= len(row))
        for c, t in enumerate(row):
            board.token((left + (c + 0.5) * side, top + side / 2), t, radius=0.44 * side)
    if idle:
        board.note((left, y + 0.5 + 0.3 * len(rows)), f"and {idle} experts of padding alone",
                   ha="left", size=8.5)  # fmt: skip


def _sorted(board: Board, y: float, rows: Rows, tokens: int) -> None:
    flat = [(e, t) for e, row in rows.items() for t in row]
    words = (
        f"{len(flat)} rows and no padding; each output, times its weight, is added up for its token"
    )
    _heading(board, (0.15, y), "4  Sorted rows", words)
    side, start = min(0.42, 8.5 / max(1, len(flat))), 0.15
    inputs, outputs = y + 0.5, y + 1.75
    middle = start + len(flat) * side / 2
    spots = [middle + (t - (tokens - 1) / 2) * max(0.75, side) for t in range(tokens)]
    spots = [x + max(0.0, 0.3 - spots[0]) for x in spots]
    for i, (e, t) in enumerate(flat):
        x = start + side * (i + 0.5)
        board.token((x, inputs), t, radius=min(0.13, 0.42 * side))
        board.arrow((x, inputs + 0.38), (spots[t], outputs - 0.16), head=False, linewidth=1.3,
                    color=COLOURS[e % len(COLOURS)])  # fmt: skip
    for e, row in rows.items():
        if row:
            at = [i for i, (owner, _) in enumerate(flat) if owner == e]
            x = start + side * (at[0] + len(row) / 2)
            _expert_tag(board, (x, inputs + 0.28), e, side * len(row) * 0.94)
    for t, x in enumerate(spots):
        board.token((x, outputs), t, radius=0.16)
    board.note((spots[-1] + 0.3, outputs), "one output per token", ha="left", size=8.5)


def capacity(before: Routing, after: Routing, tokens: Sequence[str], limit: int) -> None:
    """The places of each expert: who takes one, and who is dropped or goes elsewhere.

    Args:
        before: what the router decided.
        after: the same, edited by a capacity rule.
        tokens: a name for each token.
        limit: the places of each expert.
    """
    nobody = before.n_experts
    slots = [(t, *pair) for t in range(len(tokens))
             for pair in zip(before.experts[t].tolist(), after.experts[t].tolist())]  # fmt: skip
    visits = [slot for slot in slots if slot[1] < nobody]
    visits.sort(key=lambda slot: slot[1] != slot[2])  # who was rerouted takes a place last
    dropped = sum(got == nobody for *_, got in visits)
    moved = sum(asked != got < nobody for _, asked, got in visits)
    told = f"{dropped} of {len(visits)} visits dropped" + f", {moved} rerouted" * bool(moved)
    experts = sorted({e for slot in visits for e in slot[1:]} | set(range(min(nobody, MOST))))
    experts = [e for e in experts if e < nobody]
    board = Board(f"{limit} places for each expert: {told}", 8.0, 0.75 + 0.42 * len(experts))
    _names(board, 0.15, tokens)
    side = min(0.34, 4.0 / max(1, limit))
    edge = 1.2 + side * limit
    board.note((1.2 + side * limit / 2, 0.44), f"{limit} places", size=8.5, weight="bold")
    board.note((edge + 0.25, 0.44), "without a place", size=8.5, weight="bold", ha="left")
    for row, e in enumerate(experts):
        _shelf(board, 0.75 + 0.42 * row, e, visits, limit, side, nobody)
    board.arrow((edge + 0.08, 0.55), (edge + 0.08, 0.53 + 0.42 * len(experts)), head=False,
                linewidth=2)  # fmt: skip
    board.show(*wrapped([f"{letter(i)} {visible(name)}" for i, name in enumerate(tokens)]),
               *(_shelf_in_words(e, visits, limit, nobody) for e in experts))  # fmt: skip


def _shelf(
    board: Board, y: float, e: int, visits: Slots, limit: int, side: float, nobody: int
) -> None:
    """One expert's places, and beside them the tokens that asked for one and got none."""
    board.expert((0.6, y), e, width=0.85, height=0.28, size=8.5)
    seated = [(t, asked) for t, asked, got in visits if got == e]
    for c in range(limit):
        board.place((1.2 + c * side, y - side / 2), side, empty=c >= len(seated))
    for c, (t, asked) in enumerate(seated):
        at = (1.2 + (c + 0.5) * side, y)
        board.token(at, t, radius=0.43 * side)
        if asked != e:
            board.ring(at, 0.43 * side)
    edge, radius = 1.2 + side * limit, min(0.43 * side, 0.14)
    for c, (t, _, got) in enumerate(slot for slot in visits if slot[1] == e != slot[2]):
        at = (edge + 0.35 + 1.2 * c, y)
        board.token(at, t, radius=radius)
        if got == nobody:
            board.cross(at, radius)
        words = "dropped" if got == nobody else f"to expert {got}"
        board.note((at[0] + 0.2, y), words, ha="left", size=8.5)


def _shelf_in_words(e: int, visits: Slots, limit: int, nobody: int) -> str:
    parts = [letter(t) + f" (asked for {a})" * (a != e) for t, a, g in visits if g == e]
    parts += [f"{limit - len(parts)} free"] * (limit > len(parts))
    parts += [f"{letter(t)} dropped" for t, a, g in visits if a == e and g == nobody]
    parts += [f"{letter(t)} to expert {g}" for t, a, g in visits if a == e != g < nobody]
    return f"expert {e}: {', '.join(parts)}"
