"""The benchmarks run on the models of today; what they measure is not tested."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "training.py"


def test_the_benchmark_of_training_prints_a_row_for_each_model_and_peer():
    options = ["--batch", "2", "--seq", "16", "--seconds", "0.1"]
    run = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [line.split(" | ")[0] for line in run.stdout.splitlines() if line.startswith("| ")]
    models = ["| moe", "| dense", "| transformers, eager", "| transformers, grouped_mm"]
    assert rows == ["| step of", *models]


def test_the_benchmark_of_cost_prints_what_it_predicts_beside_what_it_measures():
    options = ["--size", "tiny", "--batch", "2", "--prompt", "4", "--rounds", "1"]
    command = [sys.executable, BENCHMARKS / "cost.py", *options]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [line.split(" | ")[:3] for line in run.stdout.splitlines() if line.startswith("| tiny")]
    assert rows == [["| tiny", "2", of] for of in ("layer", "prefill", "decode")]
    assert "worst ratio" in run.stdout


def test_the_benchmark_of_offloading_prints_a_rate_for_each_policy_batch_and_share():
    command = [sys.executable, BENCHMARKS / "offload.py", "--tokens", "16", "--length", "8"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [line for line in run.stdout.splitlines() if line.startswith(("| decode", "| prefill"))]
    assert len(rows) == 4 * 8
    assert sum(" | lfu, guessed | " in row for row in rows) == 4
    assert run.stdout.count("guessed right") == 4


def test_the_benchmark_of_decode_prints_prefill_and_decode_beside_a_peer():
    options = ["--model", "tiny-moe", "--dtype", "float32", "--peer", "eager", "--rounds", "1"]
    command = [sys.executable, BENCHMARKS / "decode.py", "--batch", "2", "--prefill", "8", *options]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [line.split(" | ")[:4] for line in run.stdout.splitlines() if "| tiny-moe" in line]
    assert rows == [["| tiny-moe", "float32", *of] for of in (["prefill 8", "1"], ["decode", "2"])]
    assert "geometric mean" in run.stdout
