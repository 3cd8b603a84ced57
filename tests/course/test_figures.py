"""What is drawn is what was given: read back from the figure, not from the eye."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from moe_ref import TopKRouter, dispatch
from moe_ref.course import figures

matplotlib.use("Agg")  # plt.show() does nothing there, so the figure stays to be read


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def words(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_lines_carry_their_values_names_and_axes():
    figures.lines(
        {"a": ([1, 2, 4], [3, 5, 9]), "b": ([1, 2, 4], torch.tensor([1.0, 1, 2]))},
        title="A finding",
        x="tokens",
        y="milliseconds",
        log="x",
        vertical={"here": 2.0},
    )
    axes = plt.gca()
    assert axes.get_title(loc="left") == "A finding"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", "milliseconds")
    assert axes.get_xscale() == "log" and axes.get_yscale() == "linear"
    first, second, upright = axes.lines
    assert list(first.get_ydata()) == [3, 5, 9] and list(second.get_ydata()) == [1, 1, 2]
    assert list(upright.get_xdata()) == [2, 2]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_lines_differ_by_marker_and_dash_too_so_that_they_read_in_grey():
    figures.lines({str(i): ([0, 1], [i, i]) for i in range(4)}, title="t", x="x", y="y")
    looks = {(line.get_marker(), line.get_linestyle()) for line in plt.gca().lines}
    assert len(looks) == 4


def test_bars_have_the_height_of_their_values_and_say_it():
    figures.bars({"total": [46.7, 7.2], "active": [12.9, 7.2]}, ["A", "B"], title="t", y="size")
    axes = plt.gca()
    assert [patch.get_height() for patch in axes.patches] == [46.7, 7.2, 12.9, 7.2]
    assert words(axes) == ["46.7", "7.2", "12.9", "7.2"]
    assert len({patch.get_hatch() for patch in axes.patches}) == 2


def test_stacked_parts_begin_where_the_one_before_ends():
    figures.stack({"a": [30, 50], "b": [70, 50]}, ["one", "two"], title="t")
    spans = [(patch.get_x(), patch.get_width()) for patch in plt.gca().patches]
    assert spans == [(0, 30), (0, 50), (30, 70), (50, 50)]


def test_matrix_writes_each_number_in_its_cell():
    figures.matrix([[0.25, 0.5], [1.0, 0.0]], title="t", x="expert", y="domain", rows=["a", "b"])
    axes = plt.gcf().axes[0]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "0.25",
        (1, 0): "0.50",
        (0, 1): "1.00",
        (1, 1): "0.00",
    }


def test_routing_marks_each_served_slot_once_and_padding_not_at_all():
    torch.manual_seed(0)
    mask = torch.tensor([True, True, False, True])
    decision = TopKRouter(8, 5, 2)(torch.randn(4, 8), mask=mask)
    figures.routing(decision, ["a", " b", "c", "d\n"], title="t")
    axes = plt.gca()
    drawn = {tuple(map(int, at)) for disc in axes.collections for at in disc.get_offsets()}
    served = [(e, t) for t, row in enumerate(decision.experts.tolist()) for e in row if e < 5]
    assert drawn == set(served) and len(served) == 6
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "␣b", "c", "d⏎"]


def test_permutation_joins_every_served_slot_to_its_row_and_gives_nobody_a_dash():
    mask = torch.tensor([True, False, True])
    decision = TopKRouter(8, 4, 2)(torch.randn(3, 8), mask=mask)
    order = dispatch.plan(decision).order
    figures.permutation(decision, order, title="t")
    axes = plt.gca()
    joined = [tuple(int(y) for y in line.get_ydata()) for line in axes.lines]
    assert joined == [(slot, row) for row, slot in enumerate(order.tolist())]
    flat = decision.experts.flatten().tolist()
    left = ["–" if expert == 4 else str(expert) for expert in flat]
    assert words(axes) == left + [str(flat[slot]) for slot in order.tolist()]


def test_text_shows_every_token_with_its_expert_and_wraps_long_lines():
    tokens, experts = [f"word{i}" for i in range(40)], [i % 11 for i in range(40)]
    figures.text(tokens, experts, title="t")
    axes = plt.gca()
    assert words(axes)[::2] == tokens
    assert words(axes)[1::2] == [str(e) for e in experts]
    assert max(text.get_position()[0] for text in axes.texts) <= 88
    assert len({text.get_position()[1] for text in axes.texts}) > 2


def test_text_with_dollar_signs_is_not_taken_for_mathematics():
    figures.text(["$a", "b$"], [0, 1], title="t")
    plt.gcf().canvas.draw()
    assert words(plt.gca())[::2] == ["$a", "b$"]


def test_roofline_is_the_smaller_of_the_two_limits():
    figures.roofline({"measured": ([1, 64], [1e10, 9e10])}, flops=1e11, bandwidth=1e10, title="t")
    xs, ys = plt.gca().lines[0].get_data()
    np.testing.assert_allclose(ys, np.minimum(100, xs * 10))
    assert xs.min() < 1 and xs.max() > 64


@pytest.mark.parametrize("number", range(8))
def test_ink_on_a_palette_colour_can_be_read(number):
    """Contrast of at least 4.5 to 1, the WCAG 2 level AA."""

    def luminance(colour):
        channels = np.array(matplotlib.colors.to_rgb(colour))
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return linear @ [0.2126, 0.7152, 0.0722]

    colour = figures.COLOURS[number]
    light, dark = sorted([luminance(colour), luminance(figures.ink(colour))])[::-1]
    assert (light + 0.05) / (dark + 0.05) >= 4.5
