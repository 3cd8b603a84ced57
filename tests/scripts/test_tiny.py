"""The trained models of data/ are what their cards say."""

import dataclasses
import re
import runpy
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_ref import Transformer, checkpoints
from moe_ref.course import corpora

ROOT = Path(__file__).parents[2]
DATA = ROOT / "data"
NAMES = ["moe", "dense"]
TINY = runpy.run_path(str(ROOT / "scripts" / "tiny.py"))

each = pytest.mark.parametrize("name", NAMES)


@cache
def model(name: str) -> Transformer:
    return checkpoints.load(DATA / f"tiny-{name}", dtype=torch.float32)


def card(name: str) -> str:
    return (DATA / f"tiny-{name}" / "README.md").read_text(encoding="utf-8")


@each
def test_a_model_has_the_shape_its_command_gives_it_and_takes_at_most_twelve_megabytes(name):
    # The scale of the router is in the weights.
    assert model(name).config == dataclasses.replace(TINY["MODELS"][name], router_options={})
    files = (DATA / f"tiny-{name}").iterdir()
    assert sum(path.stat().st_size for path in files) <= 12e6


def test_both_models_multiply_each_token_by_as_many_weights_and_saw_the_same_batches():
    moe, dense = TINY["MODELS"]["moe"], TINY["MODELS"]["dense"]
    assert moe.k * moe.d_ff == dense.d_ff
    made = r"^- (?:TrainingConfig|corpora\.batches)\(.*\)$"
    runs = [re.findall(made, card(name), re.MULTILINE) for name in NAMES]
    assert runs[0] == runs[1] == TINY["made_with"](TINY["TRAINING"], seed=0)


@each
def test_transformers_loads_model_and_tokenizer_and_gives_the_same_logits(name):
    folder = DATA / f"tiny-{name}"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = "def forward(self, x):\n    return Не удалось 无法"
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == corpora.tokenizer().encode(text).ids
    with torch.no_grad():
        torch.testing.assert_close(
            model(name)(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4
        )


@each
def test_the_card_holds_the_held_out_losses_of_the_stored_weights(name):
    rows = re.findall(r"^\| (.*) \|$", card(name), re.MULTILINE)
    table = dict(zip(rows[0].split(" | "), map(float, rows[1].split(" | ")), strict=True))
    stored = pd.read_csv(DATA / f"tiny-{name}" / "losses.csv", index_col="domain")["loss"].to_dict()
    sizes = {domain: about["held_out"] for domain, about in corpora.manifest()["domains"].items()}
    graded = set(sizes) - set(corpora.LANGUAGES)
    mean = sum(sizes[d] * stored[d] for d in graded) / sum(sizes[d] for d in graded)
    assert table.pop("all") == pytest.approx(mean, abs=2e-3)
    assert table == pytest.approx(stored, abs=1e-3)
    # The large domains take minutes; the next test reads some of them.
    losses = corpora.held_out_losses(model(name), corpora.DOMAINS, **TINY["WINDOW"])
    assert {domain: stored[domain] for domain in losses} == pytest.approx(losses, abs=2e-3)


@each
def test_the_history_has_every_tenth_step_and_ends_with_the_losses_of_the_stored_weights(name):
    steps = TINY["TRAINING"].steps
    history = pd.read_csv(DATA / f"tiny-{name}" / "history.csv")
    assert history["step"].tolist() == list(range(10, steps + 1, 10))
    held_out = pd.read_csv(DATA / f"tiny-{name}" / "held_out.csv", index_col="step")
    assert list(held_out.index) == list(range(250, steps + 1, 250))
    # But for the rounding to bfloat16 the stored weights are those of the last evaluation.
    again = corpora.held_out_losses(model(name), TINY["DOMAINS"], limit=TINY["WINDOWS"])
    assert held_out.iloc[-1].to_dict() == pytest.approx(again, abs=0.02)


def test_no_expert_is_dead_and_none_has_three_times_its_share_of_the_mix_it_was_trained_on():
    config = model("moe").config
    total = torch.zeros(config.n_layers, config.n_experts)
    with torch.no_grad():
        for domain, weight in TINY["MIX"].items():
            demand = torch.zeros_like(total)
            for batch in corpora.sweep([domain], **TINY["WINDOW"], limit=TINY["WINDOWS"]):
                routings = model("moe")(batch.inputs, mask=batch.mask).routings
                demand += torch.stack([routing.demand for routing in routings])
            total += weight * demand / demand.sum(dim=1, keepdim=True)
    share = config.n_experts * total / total.sum(dim=1, keepdim=True)
    assert share.min() > 0.3 and share.max() < 3


@each
def test_greedy_text_of_the_domains_it_was_trained_on_is_words_in_latin_letters(name):
    """Of the four languages it has read too little, and goes on in code."""
    for domain, text in TINY["samples"](model(name)).items():
        if domain not in corpora.LANGUAGES:
            letters = [letter for letter in text.lower() if letter.isalpha()]
            own = [letter for letter in letters if re.match("[a-z]", letter)]
            assert len(own) > 0.9 * len(letters) > 0, (domain, text)
