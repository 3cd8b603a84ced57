"""Break the library in known ways: the notebook that teaches the thing must notice.

    python scripts/mutations.py [NAME ...]

Each mutation changes one line in a copy of this repository and runs a notebook there under nbval. A
table says in which cell the notebook failed. The command exits with 1 if one did not fail, or if
one of them fails without a mutation. NAME is the beginning of a mutation's name; without one, all
are meant (about ten minutes).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNUSED = shutil.ignore_patterns(".git", ".venv", "build", "dist", "lab", "lab-*", "__pycache__")


@dataclass(frozen=True)
class Mutation:
    """One line of the library, made wrong, and the notebook that is to notice."""

    name: str
    notebook: str
    file: str
    right: str
    wrong: str


MUTATIONS = [
    Mutation(
        "ties go to the higher expert",
        "02",
        "moe_ref/routing.py",
        "order = scores.detach().sort(",
        "order = n_experts - 1 - scores.detach().flip(-1).sort(",
    ),
    Mutation(
        "Switch loss after capacity",
        "06",
        "moe_ref/balance.py",
        "(routing.load_share * mean_scores(routing))",
        "(routing.counts / routing.counts.sum() * mean_scores(routing))",
    ),
    Mutation(
        "warm-up off by one",
        "07",
        "moe_ref/training.py",
        "self.lr * (step + 1) / self.warmup",
        "self.lr * step / self.warmup",
    ),
    Mutation(
        "imbalance of the idlest expert",
        "06",
        "moe_ref/routing.py",
        "self.load_share.max() * self.n_experts",
        "self.load_share.min() * self.n_experts",
    ),
    Mutation(
        "imbalance of the idlest expert, counted by telemetry",
        "06",
        "moe_ref/telemetry.py",
        "self.demand.max().item() / mean",
        "self.demand.min().item() / mean",
    ),
    Mutation(
        "evaluation in training mode",
        "07",
        "moe_ref/model.py",
        "            model.eval()\n",
        "            model.train()\n",
    ),
    Mutation(
        "experts begin twice as large",
        "07",
        "moe_ref/experts.py",
        "nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5)",
        "nn.init.uniform_(parameter, -2 * inputs**-0.5, 2 * inputs**-0.5)",
    ),
    Mutation(
        "routers begin twice as large",
        "03",
        "moe_ref/routers/learned.py",
        "bound = self.d_model**-0.5",
        "bound = 2 * self.d_model**-0.5",
    ),
]


def mutate(folder: Path, mutation: Mutation) -> None:
    """Change the copy of the repository in `folder`."""
    path = folder / mutation.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutation.right) != 1:
        sys.exit(f"{mutation.name}: {mutation.file} does not hold once: {mutation.right}")
    path.write_text(source.replace(mutation.right, mutation.wrong), encoding="utf-8")


def first_failure(folder: Path, notebook: str) -> str:
    """The first cell of this notebook that fails under nbval; "" if none does."""
    (path,) = folder.glob(f"notebooks/{notebook}_*.ipynb")
    options = ["-q", "-x", "--color=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, path]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if run.returncode == 0:
        return ""
    failed = re.search(r"^FAILED \S+::(Cell \d+)", run.stdout, re.MULTILINE)
    return failed[1] if failed else f"pytest exited with {run.returncode}"


def try_out(notebook: str, mutation: Mutation | None = None) -> str:
    """The first cell that fails in a fresh copy with this mutation, or with none."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "copy"
        shutil.copytree(ROOT, folder, ignore=UNUSED)
        if mutation:
            mutate(folder, mutation)
        return first_failure(folder, notebook)


def main(names: list[str]) -> int:
    asked = [m for m in MUTATIONS if m.name.startswith(tuple(names) or "")]
    bad = 0
    for notebook in sorted({mutation.notebook for mutation in asked}):
        failure = try_out(notebook)
        bad += bool(failure)
        print(f"{notebook}  {'no mutation':<54}{failure or 'passes'}", flush=True)
    for mutation in asked:
        failure = try_out(mutation.notebook, mutation)
        bad += not failure
        print(f"{mutation.notebook}  {mutation.name:<54}{failure or 'NOT NOTICED'}", flush=True)
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
