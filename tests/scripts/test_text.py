"""The tokenizer and the manifest of data/ are what their command makes."""

import runpy
import shutil
from pathlib import Path

from moe_ref.course import corpora

ROOT = Path(__file__).parents[2]
FILES = ("tokenizer.json", "manifest.json", "README.md")


def test_the_command_rewrites_exactly_the_committed_files(tmp_path, monkeypatch, capsys):
    texts = {d: corpora.documents(d) for d in (*corpora.DOMAINS, *corpora.LARGE)}
    monkeypatch.setattr(corpora, "assembled", texts.get)  # assembled already
    shutil.copy(ROOT / "data" / "README.md", tmp_path)
    runpy.run_path(str(ROOT / "scripts" / "text.py"))["main"]([], data=tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes(), name
    assert "networkx" in capsys.readouterr().out
