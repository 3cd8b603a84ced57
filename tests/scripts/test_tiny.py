"""The trained models of data/ are what their cards say."""

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
from moe_ref.telemetry import RoutingStats

ROOT = Path(__file__).parents[2]
DATA = ROOT / "data"
NAMES = ["moe", "dense"]
TINY = runpy.run_path(str(ROOT / "scripts" / "tiny.py"))
LATIN = "a-zà-ÿœ"
SCRIPTS = {"russian": "а-яё", "japanese": "ぁ-ヿ一-鿿", "chinese": "一-鿿"}

each = pytest.mark.parametrize("name", NAMES)


@cache
def model(name: str) -> Transformer:
    return checkpoints.load(DATA / f"tiny-{name}").eval()


def card(name: str) -> str:
    return (DATA / f"tiny-{name}" / "README.md").read_text(encoding="utf-8")


@each
def test_a_model_has_the_shape_its_command_gives_it_and_takes_at_most_twelve_megabytes(name):
    assert model(name).config == TINY["MODELS"][name]
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
    losses = corpora.held_out_losses(model(name), corpora.DOMAINS, **TINY["SIZES"])
    assert table.pop("mean") == pytest.approx(sum(losses.values()) / len(losses), abs=2e-3)
    assert table == pytest.approx(losses, abs=2e-3)


@each
def test_the_history_has_every_step_and_ends_with_the_losses_of_the_stored_weights(name):
    steps = TINY["TRAINING"].steps
    history = pd.read_csv(DATA / f"tiny-{name}" / "history.csv")
    assert history["step"].tolist() == list(range(1, steps + 1))
    held_out = pd.read_csv(DATA / f"tiny-{name}" / "held_out.csv", index_col="step")
    assert list(held_out.index) == list(range(100, steps + 1, 100))
    # But for the rounding to bfloat16 the stored weights are those of the last evaluation.
    again = corpora.held_out_losses(model(name), corpora.DOMAINS, limit=TINY["WINDOWS"])
    assert held_out.iloc[-1].to_dict() == pytest.approx(again, abs=0.02)


def test_no_expert_is_dead_and_none_has_twice_its_share_of_held_out_text():
    config = model("moe").config
    layers = [RoutingStats(config.n_experts) for _ in model("moe").blocks]
    with torch.no_grad():
        for batch in corpora.sweep(corpora.DOMAINS, batch=32, seq=128, limit=64):
            routings = model("moe")(batch.inputs, mask=batch.mask).routings
            for stats, routing in zip(layers, routings, strict=True):
                stats.update(routing)
    for stats in layers:
        assert stats.overall.dead == 0
        assert stats.overall.imbalance < 2


@each
def test_greedy_text_is_in_the_script_of_its_prompt(name):
    for domain, text in TINY["samples"](model(name)).items():
        letters = [letter for letter in text.lower() if letter.isalpha()]
        own = [x for x in letters if re.match(f"[{SCRIPTS.get(domain, LATIN)}]", x)]
        assert len(own) > 0.9 * len(letters) > 0, (domain, text)
