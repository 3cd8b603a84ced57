"""Train the tokenizer of the course, and write it, the manifest and a table of where text is from.

    python scripts/text.py

Reads the text of every domain from the installed distributions, and rewrites data/tokenizer.json,
data/manifest.json and the table in data/README.md. The same text gives the same files.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe_ref.course import corpora
from moe_ref.course.text import sources

DATA = Path(__file__).parents[1] / "data"
COUNTS = ("documents", "characters", "tokens", "held_out")
BEGIN, END = "<!-- sources: begin -->\n", "<!-- sources: end -->"


def main(arguments: list[str] | None = None, data: Path = DATA) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    domains = (*corpora.DOMAINS, *corpora.LARGE)
    texts = {domain: corpora.assembled(domain) for domain in domains}
    tokenizer = train_tokenizer(texts)
    tokenizer.save(str(data / "tokenizer.json"))
    entries = {domain: entry(domain, found, tokenizer) for domain, found in texts.items()}
    written = json.dumps({"domains": entries}, indent=2, ensure_ascii=False) + "\n"
    (data / "manifest.json").write_bytes(written.encode("utf-8"))
    readme = data / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_bytes((before + BEGIN + table(entries) + END + after).encode("utf-8"))
    print(table(entries))


def train_tokenizer(texts: dict[str, tuple[str, ...]], budget: int = 300_000) -> Tokenizer:
    """Byte-level BPE on the train parts, `budget` characters of each domain.

    A small domain is read up to three times to fill its budget: fewer, and its letters stay
    bytes; more, and the vocabulary learns its sentences by heart.
    """
    sample = [text for domain in texts.values() for text in budgeted(domain, budget)]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=list(corpora.SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(sample, trainer)
    trained.encode_special_tokens = True  # "<|pad|>" written in a text is text
    return trained


def budgeted(texts: tuple[str, ...], budget: int) -> Iterator[str]:
    # In the order of their hashes: a sample of the whole domain, the same every time.
    order = sorted((hashlib.sha256(text.encode("utf-8")).digest(), text) for text in texts)
    kept = [text for _, text in order if not corpora.is_held_out(text)]
    for text in kept * 3:
        yield text[: max(0, budget)]
        budget -= len(text)


def entry(domain: str, texts: tuple[str, ...], tokenizer: Tokenizer) -> dict[str, Any]:
    """What the manifest says of a domain."""
    read = domain in sources.SOURCES
    made = {} if read else {"generated": f"incidents(seed=0, n={corpora.N_INCIDENTS})"}
    tokens = {text: len(tokenizer.encode(text).ids) for text in texts}
    return {
        "sources": sources.installed(domain),
        **made,
        "documents": len(texts),
        "characters": sum(map(len, texts)),
        "tokens": sum(tokens.values()),
        "held_out": sum(n for text, n in tokens.items() if corpora.is_held_out(text)),
        "sha256": sources.sha256(texts),
    }


def table(entries: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| domain | read from | documents | characters | tokens | of them held out | sha256 |",
        "|---|---|" + "--:|" * 4 + "---|",
    ]
    for domain, about in entries.items():
        names = [f"{s['distribution']} {s['version']} ({s['licence']})" for s in about["sources"]]
        read = "; ".join(names) or f"`moe_ref.course.corpora.{about['generated']}` (Apache-2.0)"
        counts = " | ".join(f"{about[name]:,}" for name in COUNTS)
        lines.append(f"| {domain} | {read} | {counts} | `{about['sha256'][:12]}` |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
