"""What is drawn and what is said is what was given: read back from figure and text."""

import io
import re
import subprocess
import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from nbformat.v4 import new_code_cell, new_notebook

from moe_ref import TopKRouter, dispatch
from moe_ref.course import figures
from moe_ref.course.figures.figure import COLOURS, ink, look, number, numbers, thinned


def axes_of(shown):
    return shown[-1].drawn.axes[0]


def words(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def title_of(shown) -> str:
    return shown[-1].text.splitlines()[0].removeprefix("Figure: ")


def routed(mask=None):
    torch.manual_seed(0)
    return TopKRouter(8, 5, 2)(torch.randn(4, 8), mask=mask)


# Each kind of figure, drawn from its title and one number of its data.
KINDS = {
    "lines": lambda t, v: figures.lines({"a": ([1, 2], [v, 5])}, title=t, x="x", y="y"),
    "bars": lambda t, v: figures.bars({"a": [v, 5]}, ["A", "B"], title=t, y="y"),
    "stack": lambda t, v: figures.stack({"a": [v, 5], "b": [1, 1]}, ["A", "B"], title=t),
    "matrix": lambda t, v: figures.matrix([[v, 5.0], [1, 1]], title=t, x="x", y="y"),
    "routing": lambda t, v: figures.routing(routed(torch.arange(4) != v), list("abcd"), title=t),
    "permutation": lambda t, v: figures.permutation(
        decision := routed(torch.arange(4) != v), dispatch.plan(decision).order, title=t
    ),
    "text": lambda t, v: figures.text(["a", "b"], [v, 5], title=t),
    "roofline": lambda t, v: figures.roofline(
        {"a": ([1, 64], [1e9 * v, 9e10])}, flops=1e11, bandwidth=1e10, title=t
    ),
    "history": lambda t, v: figures.history(
        {"old": ("2017-01", 1e11, 1e8), "new": ("2024-12", 7e9, v * 1e9)}, title=t
    ),
    "traits": lambda t, v: figures.traits(
        ["2017-01", "2024-12"], {"k": [4, v], "score": ["softmax", "sigmoid"]}, title=t
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_the_words_hold_the_title_and_change_with_title_and_data(kind, shown):
    for title, value in (
        ("One finding", 2),
        ("Another", 2),
        ("One finding", 3),
        ("One finding", 2),
    ):
        KINDS[kind](title, value)
    first, other_title, other_data, again = (figure.text for figure in shown)
    assert first.splitlines()[0] == "Figure: One finding"
    assert first.splitlines()[1:] == other_title.splitlines()[1:]
    assert other_title.splitlines()[0] == "Figure: Another"
    assert other_data.splitlines()[1:] != first.splitlines()[1:]
    assert again == first
    assert not re.search(r"nan|0x|-0\b(?!\.)|\bNone\b", first)


@each_kind
def test_the_picture_is_wide_enough_opaque_not_blank_and_the_same_each_time(kind, shown):
    KINDS[kind]("A finding", 2)
    (figure,) = shown
    picture = imread(io.BytesIO(figure.png))
    assert 250 <= picture.shape[1] <= 1100 and 100 <= picture.shape[0] <= 1100
    assert (picture[..., 3] == 1).all(), "a dark theme would show through"
    assert (picture[[0, -1]][..., :3] == 1).all() and (picture[:, [0, -1]][..., :3] == 1).all()
    assert picture[..., :3].std() > 0.03
    assert figure.png == figure.png


def test_a_figure_is_one_output_with_a_text_and_a_picture(shown):
    KINDS["bars"]("A finding", 2)
    bundle = shown[0]._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/png"}
    assert bundle["text/plain"] == str(shown[0]) == "Figure: A finding\ny: y\na: A = 2, B = 5"


def test_in_a_kernel_it_is_displayed_where_it_is_called_and_nothing_is_displayed_twice():
    from nbclient import NotebookClient

    cell = new_code_cell(
        "from moe_ref.course import figures\n"
        "figures.bars({'a': [2, 5]}, ['A', 'B'], title='A finding', y='y')"
    )
    NotebookClient(new_notebook(cells=[cell]), kernel_name="python3").execute()
    (output,) = cell.outputs
    assert output.output_type == "display_data"
    assert output.data["text/plain"] == "Figure: A finding\ny: y\na: A = 2, B = 5"
    assert output.data["image/png"].startswith("iVBORw0KGgo")


def test_without_a_kernel_the_words_are_printed():
    code = (
        "from moe_ref.course import figures\n"
        "figures.bars({'a': [2, 5]}, ['A', 'B'], title='A finding', y='y')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "Figure: A finding\ny: y\na: A = 2, B = 5\n"


# ------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "digits", "said"),
    [
        (0.0, 3, "0"),
        (-0.0, 3, "0"),
        (float("nan"), 3, "none"),
        (float("-inf"), 3, "-infinity"),
        (0.123456, 3, "0.123"),
        (-2.0, 3, "-2"),
        (46.7, 3, "46.7"),
        (12345, 3, "12,300"),
        (12345, 6, "12,345"),
        (999.9, 2, "1,000"),
        (46_702_792_704, 3, "46.7 billion"),
        (0.00001234, 2, "1.2e-05"),
        (0.00021, 2, "0.00021"),
    ],
)
def test_a_number_in_words(value, digits, said):
    assert number(value, digits) == said


def test_numbers_are_rounded_to_the_last_place_of_the_largest():
    assert numbers([46.71, 0.0123, -0.04], 3) == ["46.7", "0", "0"]
    assert numbers([0.0123, 0.5], 2) == ["0.01", "0.5"]
    assert numbers([8192, 12.4], 2) == ["8,200", "12"]
    assert numbers([31.4, 0.6], 0) == ["31", "1"]
    assert numbers([9.99, 0.126], 2) == ["10", "0"]


def test_long_series_keep_their_ends_and_at_most_eight_points():
    assert thinned(8) == list(range(8))
    for length in (9, 10, 100, 1000):
        kept = thinned(length)
        assert kept[0] == 0 and kept[-1] == length - 1 and len(kept) == 8
        assert max(np.diff(kept)) - min(np.diff(kept)) <= 1


# ------------------------------------------------------------------------------------- charts


def test_lines_carry_their_values_names_and_axes(shown):
    figures.lines(
        {"a": ([1, 2, 4], [3, 5, 9]), "b": ([1, 2, 4], torch.tensor([1.0, 1, 2]))},
        title="A finding",
        x="tokens",
        y="milliseconds",
        log="x",
        vertical={"here": 2.0},
        level={"limit": 4.0},
    )
    axes = axes_of(shown)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", "milliseconds")
    assert axes.get_xscale() == "log" and axes.get_yscale() == "linear"
    first, second, upright, level = axes.lines
    assert list(first.get_ydata()) == [3, 5, 9] and list(second.get_ydata()) == [1, 1, 2]
    assert list(upright.get_xdata()) == [2, 2] and list(level.get_ydata()) == [4, 4]
    (legend,) = shown[0].drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "limit"]
    assert shown[0].text == (
        "Figure: A finding\n"
        "x: tokens (logarithmic); y: milliseconds\n"
        "x at 1, 2, 4\n"
        "a: 3, 5, 9\n"
        "b: 1, 1, 2\n"
        "line here: tokens = 2\n"
        "line limit: milliseconds = 4"
    )


def test_a_band_around_a_line_is_drawn_and_said_and_a_gap_has_none(shown):
    series = {"a": ([1, 2, 3], [2, float("nan"), 3]), "b": ([1, 2, 3], [1, 1, 1])}
    figures.lines(series, title="t", x="x", y="y", spread={"a": ([1, 1, 2], [3, 3, 4])})
    (band,) = axes_of(shown).collections
    corners = {tuple(map(float, c)) for path in band.get_paths() for c in path.vertices}
    assert {(1, 1), (1, 3), (3, 2), (3, 4)} <= corners and not any(x == 2 for x, _ in corners)
    assert "a: 2 (1 to 3), none, 3 (2 to 4)\nb: 1, 1, 1" in shown[0].text


def test_digits_of_lines_are_relative_to_the_largest_but_on_a_logarithmic_axis(shown):
    series = {"a": ([1, 2], [1234.5, 0.00123])}
    figures.lines(series, title="t", x="x", y="y", digits=2)
    figures.lines(series, title="t", x="x", y="y", digits=2, log="y")
    assert "a: 1,200, 0" in shown[0].text and "a: 1,200, 0.0012" in shown[1].text


def test_32_lines_and_64_experts_look_different_in_grey_too(shown):
    figures.lines({str(i): ([0, 1], [i, i]) for i in range(32)}, title="t", x="x", y="y")
    lines = axes_of(shown).lines
    assert (
        len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 32
    )
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines[:8]}) == 8
    assert len({look(i)[:2] for i in range(64)}) == 64


def test_bars_have_the_height_of_their_values_and_say_it(shown):
    figures.bars({"total": [46.7, 7.2], "active": [12.9, 7.2]}, ["A", "B"], title="t", y="size")
    axes = axes_of(shown)
    assert [patch.get_height() for patch in axes.patches] == [46.7, 7.2, 12.9, 7.2]
    assert words(axes) == ["46.7", "7.2", "12.9", "7.2"]
    assert len({patch.get_hatch() for patch in axes.patches}) == 2
    assert (
        shown[0].text == "Figure: t\ny: size\ntotal: A = 46.7, B = 7.2\nactive: A = 12.9, B = 7.2"
    )


@pytest.mark.parametrize("spread", [[1, 2], [[1, 3], [3, 7]]], ids=["half", "ends"])
def test_bars_with_their_spread(spread, shown):
    figures.bars({"a": [2, 5]}, ["A", "B"], title="t", y="y", spread={"a": spread})
    (bars,) = [c for c in axes_of(shown).containers if hasattr(c, "has_yerr")]
    (upright,) = bars.lines[2]
    assert [segment[:, 1].tolist() for segment in upright.get_segments()] == [[1, 3], [3, 7]]
    assert "a: A = 2 (1 to 3), B = 5 (3 to 7)" in shown[0].text


def test_what_never_happened_has_a_word_and_no_bar(shown):
    never = float("nan")
    figures.bars({"a": [2, never]}, ["A", "B"], title="t", y="y", level={"even": 1.5})
    figures.bars({"a": [2, never]}, ["A", "B"], title="t", y="y", missing="not reached")
    assert words(shown[0].drawn.axes[0]) == ["2", "never"]
    assert shown[0].text == "Figure: t\ny: y\na: A = 2, B = never\nline even: y = 1.5"
    assert "a: A = 2, B = not reached" in shown[1].text
    assert [line.get_ydata()[0] for line in shown[0].drawn.axes[0].lines] == [1.5]


def test_stacked_parts_begin_where_the_one_before_ends(shown):
    figures.stack({"a": [30, 50], "b": [70, 50]}, ["one", "two"], title="t")
    spans = [(patch.get_x(), patch.get_width()) for patch in axes_of(shown).patches]
    assert spans == [(0, 30), (0, 50), (30, 70), (50, 50)]
    assert shown[0].text == "Figure: t\nx: share in percent\none: a 30, b 70\ntwo: a 50, b 50"


def test_roofline_is_the_smaller_of_the_two_limits(shown):
    figures.roofline({"measured": ([1, 64], [1e10, 9e10])}, flops=1e11, bandwidth=1e10, title="t")
    xs, ys = axes_of(shown).lines[0].get_data()
    np.testing.assert_allclose(ys, np.minimum(100, xs * 10))
    assert xs.min() < 1 and xs.max() > 64
    assert "x at 1, 64\nmeasured: 10, 90\n" in shown[0].text
    assert shown[0].text.endswith("rises to 100 GFLOP/s at 10 FLOP per byte")


# --------------------------------------------------------------------------------------- grid


def test_history_stands_in_order_of_time_and_joins_active_to_total(shown):
    models = {"b": ("2024-12", 7e9, 1e9), "a": ("2017-01", 1e11, 1e8), "c": ("2024-12", 8e9, 4e9)}
    figures.history(models, title="A finding")
    axes = axes_of(shown)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["a  2017-01", "b  2024-12", "c  2024-12"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the newest is lowest"
    joined = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    assert [tuple(map(float, xs)) for xs in joined] == [(1e8, 1e11), (1e9, 7e9), (4e9, 8e9)]
    assert words(axes) == ["0.1 %", "14 %", "50 %"]
    assert shown[0].text.splitlines()[2:] == [
        "2017: a 100 million of 100 billion (0.1 %)",
        "2024: b 1 billion of 7 billion (14 %), c 4 billion of 8 billion (50 %)",
    ]


def test_history_of_no_models_is_refused():
    with pytest.raises(ValueError, match="has none to draw"):
        figures.history({}, title="A finding")


def test_traits_are_drawn_over_time_and_counted_by_year(shown):
    dates = ["2024-12", "2017-01", "2024-07"]
    panels = {"k": [8, 4, float("nan")], "score": ["sigmoid", "softmax", "softmax"]}
    figures.traits(dates, panels, title="A finding", log=["k"])
    numbers, scores = shown[0].drawn.axes
    assert (numbers.get_yscale(), scores.get_yscale()) == ("log", "linear")
    assert numbers.lines[0].get_xdata() == pytest.approx(
        [2024 + 11.5 / 12, 2017 + 0.5 / 12, 2024.54], abs=0.01
    )
    assert scores.lines[0].get_ydata().tolist() == [1, 0, 0]
    assert [label.get_text() for label in scores.get_yticklabels()] == ["softmax", "sigmoid"]
    assert shown[0].text.splitlines()[1:] == [
        "k: 2017 4; 2024 8",
        "score: 2017 softmax 1; 2024 sigmoid 1, softmax 1",
    ]


def test_traits_want_a_value_for_each_model():
    with pytest.raises(ValueError, match=r"panels\['k'\] has 1 values for 2 dates"):
        figures.traits(["2017-01", "2018-01"], {"k": [1]}, title="A finding")


def test_matrix_writes_each_number_in_its_cell(shown):
    figures.matrix([[0.25, 0.5], [1.0, 0.0]], title="t", x="expert", y="domain", rows=["a", "b"])
    assert {text.get_position(): text.get_text() for text in axes_of(shown).texts} == {
        (0, 0): "0.25",
        (1, 0): "0.50",
        (0, 1): "1.00",
        (1, 1): "0.00",
    }
    assert shown[0].text == (
        "Figure: t\nrows: domain; columns: expert\ncolumns 0, 1\na: 0.25, 0.5\nb: 1, 0"
    )


@pytest.mark.parametrize("grid", [[[0, 2], [4, 1]], [[-4, 2], [0, 1]]])
def test_zero_is_white_and_what_is_further_from_zero_is_darker(grid, shown):
    figures.matrix(grid, title="t", x="x", y="y")
    image = axes_of(shown).images[0]
    painted = image.cmap(image.norm(np.asarray(grid, dtype=float)))[..., :3]
    by_size = painted[..., :3].sum(axis=-1).ravel()[np.argsort(np.abs(grid).ravel())]
    assert by_size[0] == 3 and (np.diff(by_size) < 0).all()


def test_few_entries_among_zeros_are_listed_and_large_grids_are_told_in_short(shown):
    figures.matrix(torch.eye(12), title="t", x="x", y="y")
    assert "not zero:\n0: 0 1\n1: 1 1\n" in shown[0].text
    figures.matrix(torch.arange(400).view(10, 40), title="t", x="x", y="y")
    assert "10 rows, 40 columns\n0: mean 20, largest 39 at 39\n" in shown[1].text
    assert len(shown[1].text.splitlines()) == 13


def test_long_names_are_whole_and_do_not_meet(shown):
    names = [f"a rather long domain {i}" for i in range(10)]
    figures.matrix(torch.rand(10, 10), title="t", x="x", y="y", columns=names, rows=names)
    shown[0].drawn.canvas.draw()
    for labels in (axes_of(shown).get_xticklabels(), axes_of(shown).get_yticklabels()):
        assert [label.get_text() for label in labels] == names
        boxes = [label.get_window_extent() for label in labels]
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_a_long_title_is_wrapped_and_not_cut(shown):
    title = "A finding in so many words that they need more than one line " * 2
    KINDS["stack"](title, 2)
    drawn = shown[0].drawn
    drawn.canvas.draw()
    (heading,) = [t for t in drawn.texts if "finding" in t.get_text()]
    assert heading.get_window_extent().x1 <= drawn.bbox.x1
    assert title_of(shown) == title.strip()


# ---------------------------------------------------------------------------------- decisions


def test_routing_marks_each_served_slot_once_and_padding_not_at_all(shown):
    decision = routed(torch.tensor([True, True, False, True]))
    figures.routing(decision, ["a", " b", "c", "d\n"], title="t")
    axes = axes_of(shown)
    drawn = {tuple(map(int, at)) for disc in axes.collections for at in disc.get_offsets()}
    served = [(e, t) for t, row in enumerate(decision.experts.tolist()) for e in row if e < 5]
    assert drawn == set(served) and len(served) == 6
    names = ["a", "␣b", "c", "d⏎"]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    said = dict(line.split(" -> ") for line in shown[0].text.splitlines()[2:])
    assert list(said) == names and said["c"] == "nobody"
    visits = [
        (int(e), t) for t, name in enumerate(names) for e in re.findall(r"(\d) \(", said[name])
    ]
    assert visits == served


def test_permutation_joins_every_served_slot_to_its_row_and_gives_nobody_a_dash(shown):
    decision = routed(torch.tensor([True, False, True, True]))
    order = dispatch.plan(decision).order
    figures.permutation(decision, order, title="t")
    axes = axes_of(shown)
    joined = [tuple(int(y) for y in line.get_ydata()) for line in axes.lines]
    assert joined == [(slot, row) for row, slot in enumerate(order.tolist())]
    flat = decision.experts.flatten().tolist()
    left = ["–" if expert == 5 else str(expert) for expert in flat]
    assert words(axes) == left + [str(flat[slot]) for slot in order.tolist()]
    said = [
        f"row {row}: token {slot // 2}, slot {slot % 2} -> {flat[slot]}"
        for row, slot in enumerate(order.tolist())
    ]
    idle = [f"no row: token 1, slot {slot} -> nobody" for slot in (0, 1)]
    assert shown[0].text.splitlines()[2:] == said + idle


def test_text_shows_every_token_with_its_expert_and_wraps_long_lines(shown):
    tokens, experts = [f"word{i}" for i in range(40)], [i % 11 for i in range(40)]
    figures.text(tokens, experts, title="t")
    axes = axes_of(shown)
    assert words(axes)[::2] == tokens
    assert words(axes)[1::2] == [str(e) for e in experts]
    assert max(text.get_position()[0] for text in axes.texts) <= 88
    assert len({text.get_position()[1] for text in axes.texts}) > 2
    said = " ".join(line.strip() for line in shown[0].text.splitlines()[2:])
    assert said == ", ".join(f"{token} {expert}" for token, expert in zip(tokens, experts))


def test_text_with_dollar_signs_is_not_taken_for_mathematics(shown):
    figures.text(["$a", "b$"], [0, 1], title="$1 and $2")
    assert shown[0].png
    assert words(axes_of(shown))[::2] == ["$a", "b$"]


@pytest.mark.parametrize("number", range(8))
def test_ink_on_a_palette_colour_can_be_read(number):
    """Contrast of at least 4.5 to 1, the WCAG 2 level AA."""

    def luminance(colour):
        channels = np.array(matplotlib.colors.to_rgb(colour))
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return linear @ [0.2126, 0.7152, 0.0722]

    colour = COLOURS[number]
    light, dark = sorted([luminance(colour), luminance(ink(colour))])[::-1]
    assert (light + 0.05) / (dark + 0.05) >= 4.5
