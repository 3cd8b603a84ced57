"""Experts that are fetched compute what experts in memory do, and the bookkeeping is exact."""

import gc
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from moe_ref import (
    Experts,
    MoELayer,
    TopKRouter,
    Transformer,
    TransformerConfig,
    checkpoints,
    generation,
    offload,
    quantise,
)
from moe_ref import dispatch as dispatches
from moe_ref.model import evaluating
from moe_ref.offload import POLICIES, Residents, Store
from moe_ref.telemetry import Trace

from .test_chain import CASES, build
from .test_repository import ROOT

SIZES = dict(n_layers=3, n_heads=4, d_ff=24, n_experts=6, k=2)
EXPERT = 3 * 32 * 24 * 4  # bytes of one


def config(**changes):
    return TransformerConfig(60, 32, **(SIZES | changes))


def prompt(batch=2, length=9, seed=0):
    return torch.randint(60, (batch, length), generator=torch.Generator().manual_seed(seed))


def looped(model):
    """The model with the backend whose bits a store gives."""
    for part in model.modules():
        if isinstance(part, Experts):
            part.backend = "loop"
    return model


@pytest.fixture
def saved(tmp_path):
    """A small model, and the folder that holds it."""
    model = looped(Transformer(config())).eval()
    checkpoints.save(model, tmp_path)
    return model, tmp_path


def recorded(model, tokens):
    trace = Trace()
    with evaluating(model):
        trace.add(model(tokens).routings)
    return trace


# ---------------------------------------------------------------- same outputs


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("experts", [1, 4, 18])
@pytest.mark.parametrize("prefetch", [False, True])
def test_outputs_do_not_depend_on_policy_budget_or_guesses(saved, policy, experts, prefetch):
    model, folder = saved
    hot = recorded(model, prompt())
    fetched = offload.load(
        folder, resident=experts * EXPERT, policy=policy, prefetch=prefetch, hot=hot
    )
    with torch.no_grad():
        for seed in range(2):
            tokens = prompt(seed=seed)
            assert torch.equal(fetched(tokens).logits, model(tokens).logits)
        alone = generation.generate(fetched, prompt(1), 4)
        assert torch.equal(alone, generation.generate(model, prompt(1), 4))


FORMATS = {
    "mixtral": {},
    "olmoe": {"router_options": {"renormalize": False}, "qk_norm": "all"},
    "qwen2_moe": {"d_shared": 40, "shared_mix": "sigmoid", "qkv_bias": True},
    "qwen3_moe": {"qk_norm": "heads", "d_dense": 20, "n_experts": (0, 6, 6)},
    "granitemoe": {"embedding_scale": 3.0, "logits_divisor": 2.0},
    "gpt_oss": {
        "activation": "clipped_swiglu",
        "bias": True,
        "router_options": {"logit_bias": True},
        "qkv_bias": True,
        "out_bias": True,
        "sinks": True,
    },
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_format_with_experts_can_be_offloaded(kind, dtype, tmp_path):
    checkpoints.save(Transformer(config(**FORMATS[kind])), tmp_path, dtype=dtype, shard_size=9000)
    assert f'"model_type": "{kind}"' in (tmp_path / "config.json").read_text()
    whole = looped(checkpoints.load(tmp_path))
    fetched = offload.load(tmp_path, resident=40_000, prefetch=True)
    with torch.no_grad():
        assert torch.equal(fetched(prompt()).logits, whole(prompt()).logits)


def test_quantised_weights_are_refused_by_name(saved):
    checkpoints.save(quantise.quantise_model(saved[0]), saved[1])
    with pytest.raises(ValueError, match="holds quantised weights: they are loaded whole"):
        offload.load(saved[1], resident=10**6)


@pytest.mark.parametrize("d_ff", [96, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 9, 40, 300])
def test_bits_are_those_of_a_loop_over_experts_in_memory(d_ff, dtype, tokens):
    experts = Experts(6, 64, d_ff, backend="loop").to(dtype)
    layer = MoELayer(TopKRouter(64, 6, 2).to(dtype), experts)
    fetched = MoELayer(layer.router, experts, dispatch=Store(experts, resident=2_000_000))
    x = torch.randn(tokens, 64, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(fetched(x)[0], layer(x)[0])


@pytest.mark.parametrize("case", CASES)
def test_a_store_computes_what_sorted_rows_do_in_every_hard_case(case):
    case = CASES[case]()
    layer = looped(build(case))
    store = Store(layer.experts, resident=2500)
    fetched = MoELayer(
        layer.router, layer.experts, capacity=case.capacity, shared=layer.shared, dispatch=store
    )
    with torch.no_grad():
        y, routing = fetched(case.x, mask=case.mask)
        assert torch.equal(y, layer(case.x, mask=case.mask)[0])
    assert store.stats.misses == (routing.counts > 0).sum()


def test_autocast_works_as_with_experts_in_memory():
    experts = Experts(6, 64, 96, backend="loop")
    layer = MoELayer(TopKRouter(64, 6, 2), experts)
    fetched = MoELayer(layer.router, experts, dispatch=Store(experts, resident=200_000))
    x = torch.randn(30, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = fetched(x)[0]
        assert torch.equal(y, layer(x)[0])
        assert y.dtype == torch.bfloat16


def test_a_dtype_that_is_not_the_files_is_converted_as_in_a_model_loaded_whole(saved):
    whole = looped(checkpoints.load(saved[1], dtype=torch.float64))
    fetched = offload.load(saved[1], resident=4 * EXPERT, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(fetched(prompt()).logits, whole(prompt()).logits)
    assert offload.pool_of(fetched).slots == 2


def test_any_dispatch_works_in_an_offloaded_model(saved):
    model, folder = saved
    fetched = offload.load(folder, resident=2 * EXPERT)
    for block in fetched.blocks:
        block.mlp.dispatch = dispatches.one_hot_einsum
    with torch.no_grad():
        torch.testing.assert_close(fetched(prompt()).logits, model(prompt()).logits)


def test_the_slots_are_all_the_memory_that_experts_take(saved):
    fetched = offload.load(saved[1], resident=4 * EXPERT + 100)
    pool = offload.pool_of(fetched)
    held = sum(weight.nbytes for slot in pool._experts for weight in slot.parameters())
    assert (pool.slots, held) == (4, 4 * EXPERT)
    assert not any("experts" in name for name, _ in fetched.named_parameters())


# ---------------------------------------------------------------- bookkeeping


def random_trace(seed, layers=3, n_experts=7, forwards=60):
    draw = random.Random(seed)
    weights, trace = [1 / (e + 1) for e in range(n_experts)], Trace()
    for _ in range(forwards):
        for layer in range(layers):
            most = draw.choice([1, 2, 2, 2, n_experts])
            trace.touched(layer, sorted({*draw.choices(range(n_experts), weights, k=most)}))
            if layer + 1 < layers:
                trace.guessed(layer + 1, draw.sample(range(n_experts), draw.choice([0, 2, 5])))
    return trace


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prefetch", [False, True])
def test_simulator_and_store_agree_exactly(saved, policy, prefetch):
    model, folder = saved
    hot = recorded(model, prompt())
    for experts in (1, 5, 11):
        trace = Trace()
        fetched = offload.load(
            folder,
            resident=experts * EXPERT,
            policy=policy,
            prefetch=prefetch,
            hot=hot,
            decay=0.8,
            trace=trace,
        )
        for batch in (1, 1, 3):
            generation.generate(fetched, prompt(batch, seed=batch), 4)
        counted = offload.pool_of(fetched).stats
        simulated = offload.simulate(
            trace, experts, policy, prefetch=prefetch, hot=hot, decay=0.8, read_bytes=EXPERT
        )
        assert simulated == counted
        assert counted.bytes_read == (counted.misses + counted.prefetched) * EXPERT


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prefetch", [False, True])
def test_a_store_replays_random_traces_as_the_simulator_does(policy, prefetch):
    for seed in range(6):
        trace, slots = random_trace(seed, layers=2), 1 + 2 * seed
        layers = [Experts(7, 4, 4) for _ in range(2)]
        pool = offload.Pool(
            offload.Host(layers, "cpu"),
            Experts(1, 4, 4),
            total=14,
            resident=slots * 3 * 4 * 4 * 4,
            policy=policy,
            hot=trace,
            decay=0.9,
        )
        for layer, experts, is_guess in trace.events:
            if is_guess and prefetch:
                pool.prefetch(layer, experts)
            elif not is_guess:
                counts = torch.tensor([int(e in experts) for e in range(7)])
                rows = torch.randn(len(experts), 4)
                with torch.no_grad():
                    y = pool.run(layer, rows, counts)
                    assert torch.equal(y, layers[layer](rows, counts))
        said = offload.simulate(
            trace,
            pool.slots,
            policy,
            hot=trace,
            decay=0.9,
            prefetch=prefetch,
            read_bytes=pool.stats.read_bytes,
        )
        assert said == pool.stats


def by_hand(trace, slots, policy, decay):
    """Hits and misses, from the definition of each policy, on a list of all past uses."""
    here, past, hits, misses, call = [], [], 0, 0, 0
    popular = Counter((n, e) for n, experts, guess in trace.events if not guess for e in experts)
    pinned = sorted(popular, key=lambda key: (-popular[key], key))[: slots - 1]
    for layer, experts, is_guess in trace.events:
        if is_guess:
            continue
        call += 1
        keys = [(layer, e) for e in experts]
        for key in [k for k in keys if k in here] + [k for k in keys if k not in here]:
            if key in here:
                hits += 1
            else:
                misses += 1
                if len(here) == slots:
                    value = {
                        k: max((t for t, used in past if used == k), default=0)
                        if policy != "lfu"
                        else sum(decay ** (call - t) for t, used in past if used == k)
                        for k in here
                        if policy != "pinned" or k not in pinned
                    }
                    here.remove(min(value, key=lambda k: (round(value[k], 9), k)))
                here.append(key)
            past.append((call, key))
            if policy == "none":
                here.remove(key)
    return hits, misses


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [1, 3, 8, 21])
def test_each_policy_is_its_definition(policy, slots):
    for seed in range(4):
        trace = random_trace(seed)
        said = offload.simulate(trace, slots, policy, hot=trace, decay=0.9)
        assert (said.hits, said.misses) == by_hand(trace, slots, policy, 0.9)


def fewest_misses(trace, slots):
    """Belady's rule for single requests: who is asked for last, or never, leaves."""
    asked = [(n, e) for n, experts, guess in trace.events if not guess for e in experts]
    here, misses = set(), 0
    for i, key in enumerate(asked):
        if key not in here:
            misses += 1
            if len(here) == slots:
                after = asked[i + 1 :]
                here.remove(
                    max(here, key=lambda k: after.index(k) if k in after else len(after) + 1)
                )
            here.add(key)
    return misses


def test_no_policy_beats_the_best_possible_and_none_keeps_nothing():
    trace = Trace()
    for layer, experts, guess in random_trace(3).events:
        if not guess:  # one at a time, so that the order of a layer's experts is fixed
            for expert in experts:
                trace.touched(layer, [expert])
    for slots in (2, 6, 12):
        best = fewest_misses(trace, slots)
        for policy in POLICIES:
            assert offload.simulate(trace, slots, policy, hot=trace).misses >= best
        assert offload.simulate(trace, slots, "none").hits == 0
    assert offload.simulate(trace, 21, "lru").misses == len(trace.popular())


@pytest.mark.parametrize("policy", POLICIES)
def test_no_slot_ever_has_two_experts(policy):
    for seed in range(8):
        residents = Residents(1 + seed, policy, hot=[(0, 1), (1, 1), (2, 3)])
        for layer, experts, is_guess in random_trace(seed).events:
            if is_guess:
                residents.prefetch(layer, experts)
            else:
                for visit in residents.visit(layer, experts):
                    assert residents._slot_of[visit.key] == visit.slot
            taken = list(residents._slot_of.values())
            assert sorted(taken + residents._free) == list(range(residents.slots))
        assert residents.stats.used <= residents.stats.prefetched
        assert residents.stats.used <= residents.stats.hits


def test_a_right_guess_makes_every_later_layer_hit():
    trace = Trace()
    for step in range(5):
        for layer in range(3):
            trace.touched(layer, [step, step + 1])
            if layer < 2:
                trace.guessed(layer + 1, [step, step + 1])
    said = offload.simulate(trace, 2, "none", prefetch=True)
    assert (said.hits, said.misses, said.prefetched, said.used) == (20, 10, 20, 20)
    assert trace.guessed_right == 1.0
    assert offload.simulate(trace, 2, "none").hits == 0


def test_the_same_run_has_the_same_statistics(saved):
    def run():
        model = offload.load(saved[1], resident=5 * EXPERT, policy="lfu", prefetch=True)
        generation.generate(model, prompt(3), 8)
        return offload.pool_of(model).stats

    assert run() == run()


def test_the_early_router_guesses_by_the_next_layers_own_norm_and_router(saved):
    model, folder = saved
    with torch.no_grad():
        for block in model.blocks:
            block.mlp_norm.weight.uniform_(0.5, 2)
            block.mlp.experts.down.mul_(0)  # the residual stream stays what it is
            block.attention.out.weight.mul_(0)
    checkpoints.save(model, folder)
    trace = Trace()
    fetched = offload.load(folder, resident=18 * EXPERT, prefetch=True, trace=trace)
    with torch.no_grad():
        fetched(prompt())
    assert trace.guessed_right == 1.0


# ---------------------------------------------------------------- limits and faults


def test_what_makes_no_sense_is_refused(saved):
    _, folder = saved
    with pytest.raises(ValueError, match=f"resident={EXPERT - 1} bytes.*one expert, {EXPERT}"):
        offload.load(folder, resident=EXPERT - 1)
    with pytest.raises(ValueError, match="policy='lfru' is none of none, lru, lfu, pinned; did"):
        offload.load(folder, resident=EXPERT, policy="lfru")
    with pytest.raises(ValueError, match="policy='pinned' needs hot"):
        offload.load(folder, resident=EXPERT, policy="pinned")
    with pytest.raises(ValueError, match="decay=0 is not"):
        offload.load(folder, resident=EXPERT, policy="lfu", decay=0)
    with pytest.raises(ValueError, match="resident=0 must be at least 1"):
        offload.load(folder, resident=0)
    with pytest.raises(ValueError, match="policy='lfru'"):
        offload.simulate(Trace(), 3, "lfru")
    with pytest.raises(ValueError, match="slots=0 must be at least 1"):
        offload.simulate(Trace(), 0)
    with pytest.raises(ValueError, match="all in memory"):
        offload.pool_of(saved[0])


def test_a_model_without_experts_is_refused(tmp_path):
    checkpoints.save(Transformer(config(n_experts=0)), tmp_path)
    with pytest.raises(ValueError, match="without experts: use checkpoints.load"):
        offload.load(tmp_path, resident=EXPERT)


def test_a_gradient_is_refused():
    experts = Experts(4, 8, 16)
    layer = MoELayer(TopKRouter(8, 4, 2), experts, dispatch=Store(experts, resident=10_000))
    with pytest.raises(ValueError, match="no gradients"):
        layer(torch.randn(3, 8, requires_grad=True))


def test_an_offloaded_model_is_not_saved_without_its_experts(saved):
    fetched = offload.load(saved[1], resident=EXPERT)
    before = (saved[1] / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="load the model whole to save it"):
        checkpoints.save(fetched, saved[1])
    assert (saved[1] / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("policy", POLICIES)
def test_a_fault_of_the_disk_is_one_error_and_the_store_goes_on_afterwards(policy, tmp_path):
    model = Transformer(config()).eval()
    checkpoints.save(model, tmp_path, shard_size=20_000)
    for prefetch in (False, True):
        fetched = offload.load(
            tmp_path,
            resident=2 * EXPERT,
            policy=policy,
            prefetch=prefetch,
            hot=recorded(model, prompt()),
        )
        with torch.no_grad():
            fetched(prompt())
            last = checkpoints.weight_files(tmp_path)[-2]
            whole = last.read_bytes()
            os.truncate(last, len(whole) // 8)
            with pytest.raises(OSError, match=rf"expert \d of MoE layer 2: .*{last.name} ends"):
                fetched(prompt())
            last.write_bytes(whole)  # the same file, whole again
            for _ in range(2):
                assert torch.equal(fetched(prompt()).logits, model(prompt()).logits)


def test_a_shard_deleted_in_the_middle_of_a_run_does_no_harm_and_a_missing_one_is_named(tmp_path):
    model = Transformer(config()).eval()
    checkpoints.save(model, tmp_path / "a", shard_size=20_000)
    fetched = offload.load(tmp_path / "a", resident=EXPERT)
    missing = checkpoints.weight_files(tmp_path / "a")[3]
    missing.unlink()
    with torch.no_grad():
        assert torch.equal(fetched(prompt()).logits, model(prompt()).logits)
    with pytest.raises(FileNotFoundError, match=missing.name):
        offload.load(tmp_path / "a", resident=EXPERT)


class Slow(offload.Host):
    """A shelf that takes its time, and fails when told to."""

    broken = False

    def fetch(self, key, slot):
        for weight in slot.parameters():
            weight.fill_(float("nan"))  # what is half read must not be used
        time.sleep(0.003)
        if self.broken:
            raise OSError("broken")
        super().fetch(key, slot)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [1, 3, 5])
def test_nothing_is_used_or_overwritten_while_it_is_being_read(policy, slots):
    trace, layers = random_trace(slots, layers=2, forwards=15), [Experts(7, 4, 4) for _ in "ab"]
    shelf = Slow(layers, "cpu")
    options = dict(total=14, resident=slots * 3 * 4 * 4 * 4, policy=policy, hot=trace)
    pool = offload.Pool(shelf, layers[0], **options)
    for number, (layer, experts, is_guess) in enumerate(trace.events):
        shelf.broken = number % 5 == 4  # a guess or a request: whatever comes now
        counts = torch.tensor([2 * int(e in experts) for e in range(7)])
        rows = torch.randn(2 * len(experts), 4)
        try:
            with torch.no_grad():
                if is_guess:
                    pool.prefetch(layer, experts)
                else:
                    y = pool.run(layer, rows, counts)
                    assert torch.equal(y, layers[layer](rows, counts))
        except OSError as error:
            assert str(error) == "broken"


def test_files_are_closed_with_the_model(saved):
    def opened():
        gc.collect()
        return sum(
            os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(saved[1].resolve()))
            for fd in os.listdir("/proc/self/fd")
        )

    if not Path("/proc/self/fd").exists():
        pytest.skip("open files can't be listed here")
    model = offload.load(saved[1], resident=EXPERT)
    assert opened() == 1
    del model
    assert opened() == 0


CHILD = """
    import resource, sys
    import torch
    from moe_ref import checkpoints, generation, offload
    folder, kind, room = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    torch.randn(64, 64) @ torch.randn(64, 64)  # what torch takes for itself is not counted
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + room, now + room))
    try:
        if kind == "whole":
            model = checkpoints.load(folder)
        else:
            model = offload.load(folder, resident=20 << 20)
        print(generation.generate(model, torch.tensor([[3, 1, 4]]), 12).tolist())
    except (MemoryError, RuntimeError, OSError, ValueError) as error:
        print("no memory:", type(error).__name__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux")
def test_a_model_larger_than_the_limit_of_memory_runs_under_it(tmp_path):
    sizes = dict(n_layers=4, n_heads=4, d_ff=512, n_experts=32, k=2)
    model = Transformer(TransformerConfig(60, 256, **sizes)).eval()
    checkpoints.save(model, tmp_path / "model", shard_size=8 << 20)
    total = sum(weight.nbytes for weight in model.parameters())
    room = 110 << 20
    assert total > 190 << 20
    program = tmp_path / "child.py"
    program.write_text(textwrap.dedent(CHILD))

    def child(kind):
        run = subprocess.run(
            [sys.executable, str(program), str(tmp_path / "model"), kind, str(room)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout.strip()

    wanted = generation.generate(model, torch.tensor([[3, 1, 4]]), 12).tolist()
    assert child("offloaded") == str(wanted)
    assert child("whole").startswith("no memory")
    shutil.rmtree(tmp_path / "model")
