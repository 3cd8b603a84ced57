"""Drawing of what a decode step reads: all of a dense block, and some experts of an MoE layer."""

from collections.abc import Sequence

from .drawing import FFN, ROUTER, Board, listed, shortened


def decode_step(n_experts: int = 8, touched: Sequence[int] = (1, 4)) -> None:
    """What a decode step reads from memory, dense and MoE: touched experts are filled.

    Args:
        n_experts: experts of the layer.
        touched: those that at least one token of the batch has chosen, counted from 0.

    Raises:
        ValueError: if one of them is not there.
    """
    for number in touched:
        if not 0 <= number < n_experts:
            raise ValueError(f"touched={number} is none of n_experts={n_experts}, from 0")
    board = Board("A step reads a dense block whole, and of an MoE what is touched", 8.8, 2.3)
    board.frame((0.1, 0.05), 8.6, 0.95, "dense")
    board.frame((0.1, 1.15), 8.6, 1.05, "MoE")
    for y in (0.6, 1.75):
        board.token((0.75, y), 0, words="x")
        board.arrow((0.9, y), (1.3, y))
    board.box((4.9, 0.6), "the whole block is read", width=7.1, colour=FFN)
    board.box((1.75, 1.75), "router", width=0.8, colour=ROUTER)
    board.arrow((2.15, 1.75), (2.5, 1.75))
    places = shortened(n_experts, 8)
    step = 5.95 / len(places)
    for i, expert in enumerate(places):
        at = (2.6 + step * (i + 0.5), 1.75)
        if expert is None:
            board.note(at, "…", size=13)
        else:
            board.expert(at, expert, used=expert in touched, words=str(expert), width=step - 0.1)
    names = [str(expert) for expert in touched]
    board.show("dense: x -> the whole block, which is read",
               f"MoE: x -> router -> {n_experts} experts; read: {listed(names) or 'none'}"
               f"; the other {n_experts - len(set(touched))} stay in memory unread")  # fmt: skip
