"""The benchmark of training runs on the models of today; what it measures is not tested."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "training.py"


def test_the_benchmark_of_training_prints_a_row_for_each_model_and_peer():
    options = ["--batch", "2", "--seq", "16", "--seconds", "0.1"]
    run = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [line.split(" | ")[0] for line in run.stdout.splitlines() if line.startswith("| ")]
    models = ["| moe", "| dense", "| transformers, eager", "| transformers, grouped_mm"]
    assert rows == ["| step of", *models]
