"""The loop: what it computes, what it records, and that a killed run goes on bit for bit."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial, wraps
from itertools import chain, repeat

import pytest
import torch
import torch.nn.functional as F

from moe_ref import Transformer, TransformerConfig, balance, checkpoints, training
from moe_ref.batches import UNGRADED, Batch
from moe_ref.course import corpora
from moe_ref.training import TrainingConfig, make_optimizer, train

SMALL = TransformerConfig(2048, 16, 2, 2, 12, n_experts=4, k=2, tied=True)
FAST = TrainingConfig(steps=6, warmup=2, lr=0.01)
TEXTS = {
    "numbers": [f"{i} and {i + 1} make {2 * i + 1}. " * 5 for i in range(60)],
    "letters": ["abc def ghi " * 20 + str(i) for i in range(60)],
}


BATCHES = partial(corpora.batches, TEXTS, batch=2, seq=16)
EVALUATE = partial(corpora.held_out_losses, domains=TEXTS, batch=8, seq=16, limit=16)


def build(config=SMALL, seed=0):
    torch.manual_seed(seed)
    return Transformer(config)


def run(config=FAST, model=None, **options):
    model = model or build()
    return model, train(model, options.pop("batches", BATCHES), config, progress=False, **options)


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
    data = BATCHES()
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
    data = BATCHES()
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


def test_padding_is_neither_routed_nor_graded_and_other_targets_may_be_left_ungraded():
    torch.manual_seed(1)
    tokens, mask = torch.randint(2048, (3, 17)), torch.ones(3, 16, dtype=torch.bool)
    mask[1, 5:], mask[2, 1:] = False, False
    targets = tokens[:, 1:].masked_fill(torch.rand(3, 16) < 0.3, UNGRADED)
    targets[:, 0] = tokens[:, 1]
    ours, plain = build(), build()
    config = dataclasses.replace(FAST, balance={"switch": 1.0})
    step = training.update(
        ours, make_optimizer(ours, config), [Batch(tokens[:, :-1], targets, mask)], config, 0
    )
    output = plain(tokens[:, :-1], mask=mask)
    graded = mask & (targets != UNGRADED)
    loss = F.cross_entropy(output.logits[graded], targets[graded])
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-6)
    switch = sum(balance.switch_loss(routing) for routing in output.routings)
    assert step["switch"] == pytest.approx(switch.item(), rel=1e-6)
    assert all(int(routing.demand.sum()) == 2 * int(mask.sum()) for routing in output.routings)
    (loss + switch).backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_a_mask_of_real_tokens_alone_changes_no_bit():
    def masked(start):
        for batch in BATCHES(start=start):
            yield Batch(batch.inputs, batch.targets, torch.ones_like(batch.targets).bool())

    def plain(start):
        return (Batch(batch.inputs, batch.targets) for batch in BATCHES(start=start))

    (one, _), (two, _), (three, _) = run(), run(batches=masked), run(batches=plain)
    for a, b, c in zip(weights(one), weights(two), weights(three), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_every_graded_target_of_an_update_counts_alike_whichever_batch_it_is_in():
    config = dataclasses.replace(FAST, accumulate=2, balance={})
    tokens, mask = torch.arange(34).view(2, 17), torch.ones(2, 16, dtype=torch.bool)
    mask[1, 3:] = False
    whole = Batch(tokens[:, :-1], tokens[:, 1:], mask)
    rows = [Batch(*(part[i : i + 1] for part in vars(whole).values())) for i in range(2)]
    one, two = (build(dataclasses.replace(SMALL, n_experts=0)) for _ in range(2))
    first = training.update(one, make_optimizer(one, config), [whole], config, 0)
    second = training.update(two, make_optimizer(two, config), rows, config, 0)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)


def test_a_model_learns_its_text_and_the_history_tells():
    config = dataclasses.replace(FAST, steps=60, evaluate_every=30)
    model, history = run(config, batches=partial(BATCHES, batch=4), evaluate=EVALUATE)
    frame, domains = history.to_frame(), history.held_out()
    assert len(frame) == 60 and list(domains.index) == [30, 60]
    assert list(domains.columns) == ["numbers", "letters"]
    assert frame["loss"].iloc[-5:].mean() < frame["loss"].iloc[0] - 2
    assert (domains.loc[60] < domains.loc[30]).all()
    assert {"switch", "imbalance", "dropped", "tokens_per_second", "lr"} <= set(frame.columns)
    assert (frame["imbalance"] >= 1).all() and (frame["dropped"] == 0).all()
    assert model.training


def test_the_imbalance_of_a_step_is_that_of_the_worst_block_over_all_its_batches():
    model = build(dataclasses.replace(SMALL, n_layers=3))
    data, demands = BATCHES(), torch.zeros(3, 4, dtype=torch.long)
    for batch in [next(data) for _ in range(2)]:
        for i, routing in enumerate(model(batch.inputs).routings):
            for expert in routing.experts.flatten().tolist():
                demands[i, expert] += 1
    blocks = [max(block) / (sum(block) / 4) for block in demands.tolist()]
    assert min(blocks) < max(blocks) - 0.05
    _, history = run(dataclasses.replace(FAST, steps=1, accumulate=2), model)
    assert history.steps[0]["imbalance"] == pytest.approx(max(blocks), rel=1e-6)


def test_dropped_shares_are_recorded():
    model = build(dataclasses.replace(SMALL, capacity_factor=0.5))
    _, history = run(model=model)
    assert all(step["dropped"] >= 0.4 for step in history.steps)


def test_every_balance_loss_can_be_switched_on():
    router = {"router": "noisy_top_k"}
    names = dict.fromkeys(balance.LOSSES, 0.01)
    config = dataclasses.replace(FAST, steps=2, balance=names)
    _, history = run(config, build(dataclasses.replace(SMALL, **router)))
    assert all(math.isfinite(history.steps[1][name]) for name in names)


def test_biases_move_once_a_step_by_the_demand_of_all_its_batches():
    options = {"router_options": {"score": "sigmoid", "selection_bias": True}}
    model = build(dataclasses.replace(SMALL, **options))
    config = dataclasses.replace(FAST, steps=1, accumulate=2, balance={}, bias_rate=0.25)
    data = BATCHES()
    demand = sum(model(next(data).inputs).routings[0].demand for _ in range(2))
    run(config, model)
    expected = 0.25 * (demand.float().mean() - demand).sign()
    assert torch.equal(model.blocks[0].mlp.router.bias, expected)


def test_autocast_trains_and_stays_near_float32():
    _, exact = run()
    _, rounded = run(dataclasses.replace(FAST, autocast=True))
    assert rounded.steps[0]["loss"] == pytest.approx(exact.steps[0]["loss"], abs=0.02)
    assert rounded.steps[0]["loss"] != exact.steps[0]["loss"]


def test_the_sequence_loss_is_taken_over_the_sequences_of_the_batch():
    model, batch = build(), next(BATCHES())
    config = dataclasses.replace(FAST, steps=1, balance={"sequence": 0.1})
    expected = sum(balance.sequence_loss(r, seq=16) for r in model(batch.inputs).routings).item()
    whole = sum(balance.sequence_loss(r) for r in model(batch.inputs).routings).item()
    _, history = run(config, model)
    assert history.steps[0]["sequence"] == pytest.approx(expected) != pytest.approx(whole)


def favourite(routing, *, seq=None):
    """A reader's own loss: the largest mean score."""
    return balance.mean_scores(routing).max()


NAMESAKES = favourite, wraps(favourite)(lambda routing, seq: favourite(routing))


def test_a_loss_of_ones_own_trains_like_one_of_the_registry_and_is_recorded_by_its_name():
    def switch_again(routing, *, seq=None):
        return balance.switch_loss(routing)

    own = dataclasses.replace(FAST, balance={"z": 0.001, switch_again: 0.1, favourite: 0})
    ours, history = run(own)
    other, reference = run(dataclasses.replace(FAST, balance={"z": 0.001, "switch": 0.1}))
    assert all(torch.equal(a, b) for a, b in zip(weights(ours), weights(other), strict=True))
    assert [step["switch_again"] for step in history.steps] == [
        step["switch"] for step in reference.steps
    ]
    scores = [routing.scores.mean(dim=0) for routing in build()(next(BATCHES()).inputs).routings]
    expected = sum(score.max().item() for score in scores)
    assert history.steps[0]["favourite"] == pytest.approx(expected)


@pytest.mark.parametrize("value", [torch.ones(2), 1.0])
def test_a_loss_that_gives_no_scalar_is_refused_by_name(value):
    def crooked(routing, *, seq=None):
        return value

    with pytest.raises(ValueError, match="balance loss crooked gave .*, which is no scalar tensor"):
        run(dataclasses.replace(FAST, balance={crooked: 0.1}))


# ------------------------------------------------------------------------------ evaluation


def test_an_evaluation_sees_the_model_without_noise_and_training_goes_on_as_without_it():
    seen = []

    def evaluate(model):
        seen.append((model.training, torch.is_grad_enabled()))
        return {"b": torch.tensor(2.0), "a": 1}

    config = dataclasses.replace(FAST, evaluate_every=4)
    model, history = run(config, noisy(), evaluate=evaluate)
    plain, _ = run(FAST, noisy())
    assert seen == [(False, False)] * 2 and model.training
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(plain), strict=True))
    table = history.held_out()
    assert list(table.index) == [4, 6] and list(table.columns) == ["b", "a"]
    assert table.loc[6].tolist() == [2.0, 1.0]


def test_given_an_evaluation_and_no_interval_it_is_called_after_the_last_step():
    _, history = run(evaluate=lambda model: {"all": 1.0})
    assert history.evaluations == [{"step": 6, "name": "all", "loss": 1.0}]


# ------------------------------------------------------------------------------ resuming

SCRIPT = """
import sys, torch
from moe_ref import Transformer, TransformerConfig, training
from tests.test_training import BATCHES, EVALUATE, FAST, SMALL, build, dataclasses, noisy
config = dataclasses.replace(FAST, steps=40, checkpoint_every=3, evaluate_every=10)
options = {"evaluate": EVALUATE, "folder": sys.argv[1], "progress": False}
training.train(noisy(), BATCHES, config, **options)
"""


def noisy():
    """Noise and drops: the random state matters, and so does the order of tokens."""
    return build(dataclasses.replace(SMALL, router="noisy_top_k", capacity_factor=1.0))


def test_a_run_killed_at_any_step_and_resumed_ends_with_the_same_bits(tmp_path):
    config = dataclasses.replace(FAST, steps=40, checkpoint_every=3, evaluate_every=10)
    reference = noisy()
    _, whole = run(config, reference, evaluate=EVALUATE, folder=tmp_path / "whole")
    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)])
    deadline = time.monotonic() + 100
    while not (folder / checkpoints.run.BEFORE).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    resumed = noisy()
    torch.manual_seed(99)  # whatever this process drew is of no account
    _, history = run(config, resumed, evaluate=EVALUATE, folder=folder)
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
    latest = tmp_path / checkpoints.run.LATEST
    latest.write_bytes(latest.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"is damaged.*delete it to go on from the one before it"):
        run(config, folder=tmp_path)
    latest.unlink()
    again, history = run(config, build(seed=7), folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(again), strict=True))
    assert len(history.steps) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.02}, "holds a run with lr=0.01, not 0.02"),
        ({"balance": {favourite: 0.1}}, "balance={'switch': 0.01}, not {'favourite': 0.1}"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(changes, message, tmp_path):
    config = dataclasses.replace(FAST, checkpoint_every=6)
    run(config, folder=tmp_path)
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(config, **changes), folder=tmp_path)
    with pytest.raises(ValueError, match="n_experts=4, not 8"):
        run(config, build(dataclasses.replace(SMALL, n_experts=8)), folder=tmp_path)


def test_a_run_with_a_loss_of_ones_own_goes_on(tmp_path):
    half = dataclasses.replace(FAST, balance={favourite: 0.1}, checkpoint_every=4)
    stopped = ending(after=5)
    with pytest.raises(ValueError, match="batches end in step 6 of steps=6"):
        run(half, batches=stopped, folder=tmp_path)
    model, history = run(half, build(seed=7), folder=tmp_path)
    reference, _ = run(half, folder=tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(reference), strict=True))
    assert len(history.steps) == 6


def ending(after):
    def batches(start):
        return (batch for i, batch in zip(range(start, after), BATCHES(start=start)))

    return batches


@pytest.mark.parametrize(
    "batches",
    [
        partial(BATCHES, seed=3),
        partial(BATCHES, batch=4),
        partial(BATCHES, seq=8),
        partial(BATCHES, mix={"numbers": 1, "letters": 9}),
        partial(corpora.batches, {**TEXTS, "letters": ["other text"] * 60}, batch=2, seq=16),
        lambda start: BATCHES(),  # ignores `start`
        lambda start: BATCHES(start=start + 1),
        lambda start: iter(()),
    ],
    ids=["seed", "batch", "seq", "mix", "text", "ignored", "shifted", "empty"],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_on_other_batches_is_refused_and_the_model_left_alone(batches, accumulate, tmp_path):
    config = dataclasses.replace(FAST, accumulate=accumulate, checkpoint_every=6)
    run(config, folder=tmp_path)
    model = build(seed=7)
    before = weights(model)
    last = 6 * accumulate - 1
    with pytest.raises(ValueError, match=rf"on other batches: batches\(start={last}\) does not"):
        run(config, model, batches=batches, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_a_folder_without_an_interval_gets_one_checkpoint_at_the_end(tmp_path):
    model, _ = run(folder=tmp_path / "new" / "folder")
    again, history = run(model=build(seed=7), folder=tmp_path / "new" / "folder")
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(again), strict=True))
    assert len(history.steps) == 6


def test_batches_may_be_a_list_from_the_number_on():
    data = BATCHES()
    listed = [next(data) for _ in range(6)]
    (one, _), (two, _) = run(), run(batches=lambda start: listed[start:])
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    config = dataclasses.replace(FAST, checkpoint_every=2)
    write = checkpoints.run.write_tensors
    written = []

    def fill(tensors, path, metadata):
        if len(written) == 2:
            path = path.parent / "no such folder" / path.name  # the operating system refuses
        written.append(path)
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoints.run, "write_tensors", fill)
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


def loss(routing, *, seq=None):
    return balance.z_loss(routing)


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
        ({"balance": {"z": 0.1, 3: 0.1}}, "balance names 3, which is none of .* and no function"),
        ({"balance": {"switch": -0.1}}, "balance gives switch the coefficient -0.1, not 0 or more"),
        ({"balance": {"switch": math.nan}}, "the coefficient nan, not 0 or more"),
        ({"balance": dict.fromkeys(NAMESAKES, 0.1)}, "two losses called 'favourite': rename one"),
        ({"balance": {loss: 0.1}}, "balance holds a loss called 'loss': rename it"),
        ({"evaluate_every": -1}, "evaluate_every=-1 must be 0 or more"),
    ],
)
def test_an_impossible_configuration_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FAST, **changes)


def test_what_an_interval_is_for_must_be_given():
    with pytest.raises(ValueError, match="checkpoint_every=3 needs a folder"):
        run(dataclasses.replace(FAST, checkpoint_every=3))
    with pytest.raises(ValueError, match="evaluate_every=3 needs evaluate"):
        run(dataclasses.replace(FAST, evaluate_every=3))


def test_a_batch_without_a_target_to_grade_is_refused():
    ones = torch.ones(1, 4, dtype=torch.long)
    batches = [Batch(ones, ones), Batch(ones, ones, torch.zeros(1, 4, dtype=torch.bool))]
    with pytest.raises(ValueError, match="batch 1 of the step has no target to grade"):
        run(dataclasses.replace(FAST, accumulate=2), batches=lambda start: repeat_all(batches))


def repeat_all(batches):
    return chain.from_iterable(repeat(batches))


def test_batches_that_are_no_function_are_refused():
    """In a process of its own: here the types of all arguments are checked before."""
    program = (
        "from moe_ref import Transformer, TransformerConfig, training\n"
        "model = Transformer(TransformerConfig(9, 16, 1, 2, 16))\n"
        "training.train(model, ['code'], training.TrainingConfig(steps=1))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ValueError: batches=['code'] must be a function" in said.stderr
