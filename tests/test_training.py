"""The loop: what it computes, what it records, and that a killed run goes on bit for bit."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from moe_ref import Transformer, TransformerConfig, balance, checkpoints, training
from moe_ref.course import corpora
from moe_ref.training import TrainingConfig, evaluate, make_optimizer, train

SMALL = TransformerConfig(4096, 16, 2, 2, 12, n_experts=4, k=2, tied=True)
FAST = TrainingConfig(steps=6, batch=2, seq=16, warmup=2, lr=0.01)
TEXTS = {
    "numbers": [f"{i} and {i + 1} make {2 * i + 1}. " * 5 for i in range(60)],
    "letters": ["abc def ghi " * 20 + str(i) for i in range(60)],
}


def build(config=SMALL, seed=0):
    torch.manual_seed(seed)
    return Transformer(config)


def run(config=FAST, model=None, **options):
    model = model or build()
    return model, train(model, TEXTS, config, progress=False, **options)


def weights(model):
    return [tensor.clone() for tensor in model.state_dict().values()]


# ------------------------------------------------------------------------------ the loop


def test_steps_are_those_of_a_plain_loop_over_the_same_batches():
    ours, history = run()
    plain = build()
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    norms = [p for p in plain.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    data = corpora.batches(TEXTS, batch=2, seq=16, seed=0)
    for step in range(6):
        batch = next(data)
        output = plain(batch.inputs)
        loss = F.cross_entropy(output.logits.flatten(0, 1), batch.targets.flatten())
        extra = sum(balance.switch_loss(routing) for routing in output.routings)
        (loss + 0.01 * extra).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = FAST.lr_at(step)
        optimizer.step()
        optimizer.zero_grad()
        assert history.steps[step]["loss"] == loss.item()
        assert history.steps[step]["switch"] == pytest.approx(extra.item())
    assert all(torch.equal(a, b) for a, b in zip(weights(ours), weights(plain), strict=True))


def test_the_learning_rate_warms_up_and_falls_as_a_cosine_to_its_last_value():
    config = TrainingConfig(steps=101, lr=1.0, warmup=10, final_lr=0.1)
    rates = [config.lr_at(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == pytest.approx(1.0) and rates[100] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.55)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_accumulated_batches_give_the_gradient_of_one_large_batch():
    model = build(dataclasses.replace(SMALL, n_experts=0))
    config = dataclasses.replace(FAST, steps=1, accumulate=3, balance={})
    data = corpora.batches(TEXTS, batch=2, seq=16, seed=0)
    parts = [next(data) for _ in range(3)]
    large = dataclasses.replace(
        parts[0],
        tokens=torch.cat([p.tokens for p in parts]),
        domains=torch.cat([p.domains for p in parts]),
    )
    other = build(model.config)
    one = training.update(model, make_optimizer(model, config), parts, config, 0)
    two = training.update(other, make_optimizer(other, config), [large], config, 0)
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_a_model_learns_its_text_and_the_history_tells():
    config = dataclasses.replace(FAST, steps=60, batch=4, evaluate_every=30)
    model, history = run(config)
    frame, domains = history.to_frame(), history.by_domain()
    assert len(frame) == 60 and list(domains.index) == [30, 60]
    assert list(domains.columns) == ["numbers", "letters"]
    assert frame["loss"].iloc[-5:].mean() < frame["loss"].iloc[0] - 2
    assert (domains.loc[60] < domains.loc[30]).all()
    assert {"switch", "imbalance", "dropped", "tokens_per_second", "lr"} <= set(frame.columns)
    assert (frame["imbalance"] >= 1).all() and (frame["dropped"] == 0).all()
    assert model.training


def test_dropped_shares_are_recorded():
    model = build(dataclasses.replace(SMALL, capacity=0.5))
    _, history = run(model=model)
    assert all(step["dropped"] >= 0.4 for step in history.steps)


def test_every_balance_loss_can_be_switched_on():
    router = {"router": "noisy_top_k"}
    names = dict.fromkeys(training.LOSSES, 0.01)
    config = dataclasses.replace(FAST, steps=2, balance=names)
    _, history = run(config, build(dataclasses.replace(SMALL, **router)))
    assert all(math.isfinite(history.steps[1][name]) for name in names)


def test_biases_move_once_a_step_by_the_demand_of_all_its_batches():
    options = {"router_options": {"score": "sigmoid", "selection_bias": True}}
    model = build(dataclasses.replace(SMALL, **options))
    config = dataclasses.replace(FAST, steps=1, accumulate=2, balance={}, bias_rate=0.25)
    data = corpora.batches(TEXTS, batch=2, seq=16, seed=0)
    demand = sum(model(next(data).inputs).routings[0].demand for _ in range(2))
    run(config, model)
    expected = 0.25 * (demand.float().mean() - demand).sign()
    assert torch.equal(model.blocks[0].mlp.router.bias, expected)


def test_autocast_trains_and_stays_near_float32():
    _, exact = run()
    _, rounded = run(dataclasses.replace(FAST, autocast=True))
    assert rounded.steps[0]["loss"] == pytest.approx(exact.steps[0]["loss"], abs=0.02)
    assert rounded.steps[0]["loss"] != exact.steps[0]["loss"]


def test_held_out_loss_is_the_mean_over_every_held_out_token_of_a_domain():
    model = build()
    model.train()
    ours = evaluate(model, TEXTS, batch=3, seq=16)
    assert model.training
    model.eval()
    for name, texts in TEXTS.items():
        total, count = 0.0, 0
        for batch in corpora.sweep({name: texts}, batch=1, seq=16):
            shares = model(batch.inputs, mask=batch.mask).logits.log_softmax(dim=-1)
            right = shares.gather(-1, batch.targets[..., None])[..., 0][batch.mask]
            total, count = total - right.sum().item(), count + len(right)
        assert ours[name] == pytest.approx(total / count, rel=1e-5)


# ------------------------------------------------------------------------------ resuming

SCRIPT = """
import sys, torch
from moe_ref import Transformer, TransformerConfig, training
from tests.test_training import SMALL, FAST, TEXTS, build, dataclasses, noisy
config = dataclasses.replace(FAST, steps=40, checkpoint_every=3, evaluate_every=10)
training.train(noisy(), TEXTS, config, folder=sys.argv[1], progress=False)
"""


def noisy():
    """Noise and drops: the random state matters, and so does the order of tokens."""
    return build(dataclasses.replace(SMALL, router="noisy_top_k", capacity=1.0))


def test_a_run_killed_at_any_step_and_resumed_ends_with_the_same_bits(tmp_path):
    config = dataclasses.replace(FAST, steps=40, checkpoint_every=3, evaluate_every=10)
    reference = noisy()
    whole = train(reference, TEXTS, config, folder=tmp_path / "whole", progress=False)
    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)])
    deadline = time.monotonic() + 100
    while not (folder / checkpoints.BEFORE).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    resumed = noisy()
    torch.manual_seed(99)  # whatever this process drew is of no account
    history = train(resumed, TEXTS, config, folder=folder, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(reference), strict=True))
    assert [s["loss"] for s in history.steps] == [s["loss"] for s in whole.steps]
    assert history.evaluations == whole.evaluations


def test_a_finished_run_is_left_as_it_is(tmp_path):
    config = dataclasses.replace(FAST, checkpoint_every=6)
    model, history = run(config, folder=tmp_path)
    again, same = run(config, build(seed=7), folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(again), strict=True))
    assert same.steps == history.steps


def test_a_truncated_checkpoint_is_refused_and_the_one_before_it_serves(tmp_path):
    config = dataclasses.replace(FAST, checkpoint_every=2)
    model, _ = run(config, folder=tmp_path)
    latest = tmp_path / checkpoints.LATEST
    latest.write_bytes(latest.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"is damaged.*delete it to go on from the one before it"):
        run(config, folder=tmp_path)
    latest.unlink()
    again, history = run(config, build(seed=7), folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(again), strict=True))
    assert len(history.steps) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lr": 0.02}, "holds a run with lr=0.01, not 0.02"), ({"seed": 3}, "seed=0, not 3")],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(changes, message, tmp_path):
    config = dataclasses.replace(FAST, checkpoint_every=6)
    run(config, folder=tmp_path)
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(config, **changes), folder=tmp_path)
    with pytest.raises(ValueError, match="n_experts=4, not 8"):
        run(config, build(dataclasses.replace(SMALL, n_experts=8)), folder=tmp_path)


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    config = dataclasses.replace(FAST, checkpoint_every=2)
    write = checkpoints.write_tensors
    written = []

    def fill(tensors, path, metadata):
        if len(written) == 2:
            path = path.parent / "no such folder" / path.name  # the operating system refuses
        written.append(path)
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoints, "write_tensors", fill)
    with pytest.raises(OSError, match=r"could not write .*what was there is as it was"):
        run(config, folder=tmp_path)
    monkeypatch.undo()
    again, history = run(config, build(seed=7), folder=tmp_path)
    reference, _ = run()
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(reference), strict=True))


# ------------------------------------------------------------------------------ errors


def test_a_run_that_diverges_says_where_and_keeps_the_weights_before():
    model = build()
    with torch.no_grad():
        model.norm.weight.fill_(torch.inf)
    before = weights(model)
    with pytest.raises(FloatingPointError, match=r"step 1: loss nan.*try a lower lr"):
        run(FAST, model)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"lr": 0.0}, "lr=0.0 must be more than 0"),
        ({"lr": math.nan}, "lr=nan must be more than 0"),
        ({"clip": -1.0}, "clip=-1.0 must be more than 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be 0 or more"),
        ({"balance": {"swich": 0.1}}, "balance names 'swich', which is none of importance"),
        ({"evaluate_every": -1}, "evaluate_every=-1 must be 0 or more"),
    ],
)
def test_an_impossible_configuration_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FAST, **changes)


def test_checkpoints_without_a_folder_are_refused():
    with pytest.raises(ValueError, match="checkpoint_every=3 needs a folder"):
        run(dataclasses.replace(FAST, checkpoint_every=3))
