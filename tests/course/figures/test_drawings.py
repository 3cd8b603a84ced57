"""A drawing is legible, exact, and says in words what is drawn and how it is connected."""

import io
import re
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from moe_ref import Capacity, SwitchRouter, TopKRouter, dispatch
from moe_ref.course import figures

WORDS = ["the", "stolen", "key", "opens", "the", "desk"]


def routed(n_experts=4, k=2, tokens=6):
    torch.manual_seed(0)
    return TopKRouter(8, n_experts, k)(2 * torch.randn(tokens, 8))


def crowded(**rule):
    """Six tokens that want expert 0, 0, 0, 1, 1, 2 of 4, with two places for each."""
    router = SwitchRouter(4, 4)
    router.weight.data.copy_(torch.eye(4))
    decision = router(torch.eye(4)[[0, 0, 0, 1, 1, 2]] * 3 + torch.tensor([0.0, 0.1, 0.3, 0.2]))
    return decision, Capacity(1.0, **rule)(decision)


DRAWINGS = {
    "dense block": figures.transformer_block,
    "MoE block": lambda: figures.transformer_block(moe=True),
    "swiglu": figures.ffn,
    "relu": lambda: figures.ffn(activation="relu"),
    "MoE layer": figures.moe_layer,
    "MoE layer of one expert": lambda: figures.moe_layer(1, 1),
    "MoE layer, all chosen": lambda: figures.moe_layer(4, 4),
    "MoE layer of 64": lambda: figures.moe_layer(64, 8),
    "dispatch": lambda: figures.dispatch_forms(routed(), WORDS),
    "dispatch to 8": lambda: figures.dispatch_forms(routed(8), WORDS),
    "dispatch to 64": lambda: figures.dispatch_forms(routed(64, 8, 20), WORDS * 4),
    "dispatch of one": lambda: figures.dispatch_forms(routed(2, 1, 1), WORDS[:1]),
    "drops": lambda: figures.capacity(*crowded(), WORDS, 2),
    "reroutes": lambda: figures.capacity(*crowded(overflow="reroute"), WORDS, 2),
    "upcycling": figures.upcycling,
    "upcycling to 32": lambda: figures.upcycling(32),
    "patches": lambda: figures.patches(np.arange(64).reshape(8, 8) / 64, 2),
    "four patches": lambda: figures.patches(torch.rand(8, 8), 4),
    "MMoE": lambda: figures.mmoe(4, ["which digit", "how much ink"]),
    "MMoE of 9, three tasks": lambda: figures.mmoe(9, ["a", "b", "c"]),
    "feedback": figures.feedback_loop,
    "pipeline": figures.router_pipeline,
    "PR-MoE": figures.pr_moe,
    "PR-MoE of two blocks": lambda: figures.pr_moe((64, 128)),
    "file": lambda: figures.tensor_file(
        4000,
        [
            (f"model.layers.{i}.self_attn.q_proj.weight", 10**6 * i, 10**6 * (i + 1))
            for i in range(50)
        ],
    ),
    "decode step": figures.decode_step,
    "decode step of 128": lambda: figures.decode_step(128, [0, 2, 127]),
    "decode step without a token": lambda: figures.decode_step(4, []),
    "file of one tensor": lambda: figures.tensor_file(60, [("head", 0, 8)]),
}
each = pytest.mark.parametrize("name", DRAWINGS)


def drawn(name, shown):
    DRAWINGS[name]()
    (figure,) = shown
    figure.drawn.canvas.draw()
    return figure.drawn


@each
def test_no_words_overlap_and_none_is_cut(name, shown):
    sheet = drawn(name, shown)
    texts = [t for t in [*sheet.texts, *sheet.axes[0].texts] if t.get_text()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert len(boxes) > 4
    for (one, a), (other, b) in combinations(boxes, 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        tall = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert wide <= 1 or tall <= 1, f"{one!r} overlaps {other!r}"
    for words, box in boxes:
        assert box.x0 >= 0 and box.x1 <= sheet.bbox.x1, f"{words!r} is cut"
        assert box.y0 >= 0 and box.y1 <= sheet.bbox.y1, f"{words!r} is cut"


@each
def test_words_fit_in_their_boxes(name, shown):
    axes = drawn(name, shown).axes[0]
    boxes = {
        patch.get_gid(): patch.get_window_extent() for patch in axes.patches if patch.get_gid()
    }
    written = [text for text in axes.texts if text.get_gid()]
    assert len(written) == len(boxes)
    for text in written:
        outer, inner = boxes[text.get_gid().removeprefix("in ")], text.get_window_extent()
        assert inner.x0 >= outer.x0 and inner.x1 <= outer.x1, text.get_text()
        assert inner.y0 >= outer.y0 and inner.y1 <= outer.y1, text.get_text()


@each
def test_the_picture_is_opaque_not_blank_and_of_a_size_that_a_notebook_shows(name, shown):
    drawn(name, shown)
    picture = imread(io.BytesIO(shown[0].png))
    assert 600 <= picture.shape[1] <= 1050 and 100 <= picture.shape[0] <= 1100
    assert (picture[..., 3] == 1).all()
    assert (picture[[0, -1]][..., :3] == 1).all() and (picture[:, [0, -1]][..., :3] == 1).all()
    assert picture[..., :3].std() > 0.06


@each
def test_the_words_begin_with_a_title_and_are_no_longer_than_a_page(name, shown):
    drawn(name, shown)
    lines = shown[0].text.splitlines()
    assert re.match(r"Figure: \S.+", lines[0]) and 2 <= len(lines) <= 40
    assert all(len(line) <= 150 for line in lines[1:])
    assert not re.search(r"nan|None|\$", shown[0].text)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("dense block", ["norm -> attention -> added to x", "norm -> FFN -> added", "residual"]),
        ("MoE block", ["norm -> attention -> added to x", "norm -> MoE layer -> added", "router"]),
        ("swiglu", ["W_gate", "W_up", "SiLU(gate) times up", "W_down -> y"]),
        ("relu", ["W_up", "ReLU", "W_down -> y"]),
        ("MoE layer", ["router", "top 2", "expert 1 and expert 3", "weight", "2 of 4 experts"]),
        ("MoE layer of 64", ["64 experts -> the top 8", "6 not drawn", "56 of 64 experts"]),
        ("dispatch", ["loop", "one-hot einsum", "padded bmm", "sorted rows", "summed"]),
        ("upcycling", ["attention copied", "the FFN 4 times", "router is new"]),
        ("patches", ["16 patches of 2 x 2", "position"]),
        (
            "MMoE",
            ["4 experts, shared", "gate of which digit: softmax", "head -> how much ink"],
        ),
        ("feedback", ["more tokens -> more gradient", "fewer tokens -> less gradient"]),
        (
            "pipeline",
            ["logits", "noise", "scores", "bias", "-infinity", "top k", "weights"],
        ),
        ("PR-MoE", ["8, 16, 32 and 40 experts", "c_0 times the expert", "c_1 times the dense"]),
        ("file", ["4,000 bytes of JSON", "layers.49.self_attn.q_proj.weight: bytes 49,004,008"]),
    ],
)
def test_the_words_name_the_parts_and_their_connections(name, parts, shown):
    drawn(name, shown)
    for part in parts:
        assert part in shown[0].text


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("dense block", ["norm", "norm", "attention", "FFN", "+", "+"]),
        ("MoE block", ["norm", "norm", "attention", "router", "expert 3", "+", "+", "+"]),
        ("MoE layer", ["router\n$W x$", "expert 0", "expert 3", "+"]),
        ("pipeline", ["W x", "+ noise", "softmax\nor sigmoid", "+ bias", "top k", "weights"]),
        ("PR-MoE", ["8 experts", "40 experts", "dense FFN", "router", "times $c_1$", "+"]),
        ("file", ["length of\nthe header", "8", "4,008", "49,004,008", "…"]),
    ],
)
def test_what_the_words_name_is_drawn(name, parts, shown):
    texts = [text.get_text() for text in drawn(name, shown).axes[0].texts]
    for part in parts:
        assert texts.count(part) >= parts.count(part)


def test_the_ffn_has_the_activations_of_the_library(shown):
    from moe_ref.ffn import ACTIVATIONS

    for activation in ACTIVATIONS:
        figures.ffn(activation)
    texts = dict(zip(ACTIVATIONS, (figure.text for figure in shown), strict=True))
    assert len(set(texts.values())) == len(ACTIVATIONS)
    for activation, (gated, _) in ACTIVATIONS.items():
        assert ("W_gate" in texts[activation]) == gated
    with pytest.raises(ValueError, match="activation='tanh' is none of"):
        figures.ffn("tanh")


# ----------------------------------------------------- tokens on the move, against the library


def part(text, start, end):
    """What the words say between two of their lines, in one line."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(start))
    last = next(i for i, line in enumerate(lines) if i > first and line.startswith(end))
    return " ".join(line.strip() for line in lines[first + 1 : last])


@pytest.mark.parametrize(("n_experts", "k"), [(4, 2), (8, 2), (3, 1), (3, 3)])
def test_the_four_forms_say_what_the_library_computes(n_experts, k, shown):
    decision = routed(n_experts, k)
    figures.dispatch_forms(decision, WORDS)
    text = shown[0].text
    visits = re.findall(r"(\w) -> (\d)", part(text, "loop", "one-hot"))
    flat = [("ABCDEF"[t], str(e)) for t, row in enumerate(decision.experts.tolist()) for e in row]
    assert visits == flat

    mask = dispatch.one_hot(decision)
    ones = {(f"{'ABCDEF'[t]}", f"{e}.{c}") for t, e, c in mask.nonzero().tolist()}
    assert set(re.findall(r"(\w) (\d\.\d)", part(text, "one-hot", "padded"))) == ones
    zeros = mask.numel() - len(ones)
    assert f"6 x {mask.shape[1] * mask.shape[2]}, {len(ones)} ones and {zeros} zeros" in text

    places = mask.shape[1] * mask.shape[2]
    assert f"padded bmm: {places} rows, {places - 6 * k} of them padding" in text

    order = (dispatch.plan(decision).order // k).tolist()
    rows = part(text, "sorted rows", "each output")
    assert "".join(re.findall(r"\b[A-F]\b", rows)) == "".join("ABCDEF"[t] for t in order)


def test_the_four_forms_draw_every_visit_and_hatch_all_padding(shown):
    decision = routed(8)
    axes = drawn("dispatch to 8", shown).axes[0]
    texts = [text.get_text() for text in axes.texts]
    places = dispatch.one_hot(decision).shape
    assert texts.count("1") - texts.count("expert 1") >= 12  # a 1 in the mask for each visit
    hatched = [patch for patch in axes.patches if patch.get_hatch()]
    assert len(hatched) == places[1] * places[2] - 12
    for i, name in enumerate("ABCDEF"):
        # In the list of names, before the mask and among the outputs once; else once a visit.
        assert texts.count(name) == 3 + 3 * int((decision.experts[i] < 8).sum())


def test_who_gets_no_place_is_crossed_out_and_said(shown):
    before, after = crowded()
    figures.capacity(before, after, WORDS, 2)
    text = shown[0].text
    assert text.splitlines()[0] == "Figure: 2 places for each expert: 1 of 6 visits dropped"
    said = [line for line in text.splitlines() if line.startswith("expert")]
    assert said == [
        "expert 0: A, B, C dropped",
        "expert 1: D, E",
        "expert 2: F, 1 free",
        "expert 3: 2 free",
    ]
    assert int(after.overflow.sum()) == 1


def test_who_is_rerouted_stands_at_both_experts(shown):
    before, after = crowded(overflow="reroute")
    new = int(after.experts[2, 0])
    figures.capacity(before, after, WORDS, 2)
    text = shown[0].text
    assert "0 of 6 visits dropped, 1 rerouted" in text
    assert f"expert 0: A, B, C to expert {new}" in text
    assert re.search(rf"^expert {new}: .*C \(asked for 0\)", text, re.MULTILINE)


def test_patches_hold_the_pixels_of_the_image(shown):
    image = np.arange(64).reshape(8, 8) / 10
    figures.patches(image, 4)
    images = [picture.get_array() for picture in shown[0].drawn.axes[0].images]
    np.testing.assert_array_equal(images[0], image)
    for tile, corner in zip(images[1:], [(0, 0), (0, 4), (4, 0), (4, 4)], strict=True):
        np.testing.assert_array_equal(tile, image[corner[0] :, corner[1] :][:4, :4])
    assert "1.35, 1.75\n4.55, 4.95\n" in shown[0].text
    with pytest.raises(ValueError, match="patch=3 does not divide the image's 8 x 8 pixels"):
        figures.patches(image, 3)
