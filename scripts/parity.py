"""How near each family of checkpoints is to transformers: the table in docs/checkpoints.md.

    python -m scripts.parity [--write]

For each family transformers makes a small model with the settings of a released one, all of its
parameters drawn at random. A gap is the largest difference of two logits over the largest logit.
In bfloat16 it is the median difference from the float32 model, ours beside that of transformers.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
import torch
import transformers

from moe_ref import checkpoints
from moe_ref.kv_cache import ContiguousCache
from tests.parity.families import FAMILIES, LENGTH, theirs_of, tokens

PAGE = Path(__file__).parents[1] / "docs" / "checkpoints.md"
BEGIN, END = "<!-- parity: begin -->\n", "<!-- parity: end -->"


@torch.no_grad()
def measure(name: str) -> dict[str, str]:
    """One line of the table."""
    theirs, gaps = theirs_of(name), {}
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(f"{folder}/theirs", max_shard_size="100KB")
        ours = checkpoints.load(f"{folder}/theirs")
        checkpoints.save(ours, f"{folder}/ours")
        back = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/ours")
        logits, cache = ours(tokens()).logits, ContiguousCache(ours.config, 2, LENGTH)
        pieces = tokens().split([10, *[1] * (LENGTH - 10)], dim=1)
        cached = torch.cat([ours(piece, cache=cache).logits for piece in pieces], dim=1)
        gaps["read"] = gap(logits, theirs(tokens()).logits)
        gaps["written"] = gap(back(tokens()).logits, logits)
        gaps["cached decode"] = gap(cached, theirs(tokens()).logits)
        short = theirs.bfloat16()
        short.save_pretrained(f"{folder}/short")
        exact = checkpoints.load(f"{folder}/short", dtype=torch.float32)(tokens(16)).logits
        models = {"bfloat16": checkpoints.load(f"{folder}/short"), "transformers": short}
        for whose, model in models.items():
            gaps[whose] = f"{(model(tokens(16)).logits - exact).abs().median():.4f}"
    return {"family": name} | gaps


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    return f"{((ours - theirs).abs().max() / theirs.abs().max()).item():.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    table = pd.DataFrame([measure(name) for name in FAMILIES]).set_index("family")
    lines = [f"| {' | '.join(['family', *table.columns])} |", "|---" + "|--:" * 5 + "|"]
    lines += [f"| {name} | {' | '.join(row)} |" for name, row in zip(table.index, table.values)]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(before + BEGIN + text + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
