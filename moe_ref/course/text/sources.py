"""Where the text of `corpora` comes from: installed distributions, read at run time and cleaned.

Standard library only, and the same text from the same distributions on every Python version and
platform: files differing between platforms or versions are left out, paths are sorted.
"""

import ast
import gc
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import no_type_check

_SYMPY_CODE = "geometry ntheory series sets stats vector"
_SYMPY_PROSE = (
    "calculus categories combinatorics core crypto diffgeom geometry logic ntheory physics"
    " utilities"
)
_NUMPY_PROSE = "_core fft lib linalg ma polynomial"
_TORCH = "_dynamo _functorch _inductor _refs ao distributed distributions export fx nn optim utils"
_SYMPY_LIBRARY = (
    "algebras assumptions calculus categories combinatorics concrete core crypto diffgeom functions"
    " holonomic integrals interactive liealgebras logic matrices multipledispatch parsing physics"
    " plotting polys printing sandbox simplify solvers strategies tensor unify utilities"
)
_LARGE: dict[str, tuple[str, ...]] = {
    "torch": tuple(f"torch/{name}/" for name in _TORCH.split()),
} | {"scipy": ("scipy/",), "pandas": ("pandas/",), "scikit-learn": ("sklearn/",)}

# For each domain: distributions, and the folders read inside each ("incidents" is made, not read).
# "library" is more code, and "manual" more prose, for long trainings only.
SOURCES: dict[str, dict[str, tuple[str, ...]]] = {
    "code": {
        "networkx": ("networkx/",),
        "sympy": tuple(f"sympy/{name}/" for name in _SYMPY_CODE.split()),
    },
    "prose": {
        "networkx": ("networkx/",),
        "numpy": tuple(f"numpy/{name}/" for name in _NUMPY_PROSE.split()),
        "matplotlib": ("matplotlib/",),
        "sympy": tuple(f"sympy/{name}/" for name in _SYMPY_PROSE.split()),
    },
    "french": {"jupyterlab-language-pack-fr-FR": ("jupyterlab_language_pack_fr_FR/",)},
    "russian": {"jupyterlab-language-pack-ru-RU": ("jupyterlab_language_pack_ru_RU/",)},
    "japanese": {"jupyterlab-language-pack-ja-JP": ("jupyterlab_language_pack_ja_JP/",)},
    "chinese": {"jupyterlab-language-pack-zh-CN": ("jupyterlab_language_pack_zh_CN/",)},
    "library": _LARGE | {"sympy": tuple(f"sympy/{name}/" for name in _SYMPY_LIBRARY.split())},
    "manual": _LARGE,
}

# A message is kept if most of its letters are of the language's script, and if it is a phrase.
_SCRIPT = {
    "french": re.compile(r"[a-zà-ÿœ]", re.I),
    "russian": re.compile(r"[а-яё]", re.I),
    "japanese": re.compile(r"[ぁ-ヿ㐀-鿿]"),
    "chinese": re.compile(r"[㐀-鿿]"),
}
_LEAST = {"french": (3, 12), "russian": (2, 12), "japanese": (1, 5), "chinese": (1, 5)}
_SENTENCE_END = re.compile(r"(?<=[。！？])\s*|(?<=[.!?])\s+")

_LICENCES = {
    "License :: OSI Approved :: BSD License": "BSD-3-Clause",
    "License :: OSI Approved :: Python Software Foundation License": "PSF-2.0",
}


def assemble(domain: str) -> tuple[str, ...]:
    """The documents of a domain of `SOURCES`, without duplicates.

    Raises ModuleNotFoundError that names a missing distribution and the command that installs it.
    """
    make: Callable[[str], Iterable[str]]
    own = {"code": _code, "library": _code, "prose": _prose, "manual": _prose}
    make = own.get(domain, _messages)
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are many objects and no cycles: this halves the time
    try:
        return tuple(dict.fromkeys(make(domain)))
    finally:
        if collecting:
            gc.enable()


def folder(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """A reader's own text: each sub-folder, and each file beside them, is a domain.

    A sub-folder gives all files below it. Files are cut at blank lines into documents of about
    2,000 characters, so that even one file has a train and a held-out part. Hidden files are
    ignored. Raises FileNotFoundError or ValueError that names what is missing, empty or not text.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"path={str(path)!r} does not exist; give a folder of text files")
    if not root.is_dir():
        raise ValueError(f"path={str(path)!r} is a file; give the folder that holds it")
    domains: dict[str, list[str]] = {}
    for entry in sorted(root.iterdir()):
        if entry.name.startswith("."):
            continue
        name = entry.name if entry.is_dir() else entry.stem
        if name in domains:
            raise ValueError(f"{entry} gives the domain {name!r} a second time; rename it")
        files = _visible_files(entry) if entry.is_dir() else [entry]
        pieces = (document for file in files for document in _documents_of(file))
        domains[name] = list(dict.fromkeys(pieces))
        if not domains[name]:
            raise ValueError(f"{entry} holds no text; each domain needs at least one text file")
    if not domains:
        raise ValueError(f"path={str(path)!r} is empty; put one folder or text file per domain")
    return domains


def installed(domain: str) -> list[dict[str, str]]:
    """Distribution, version and licence of everything a domain reads."""
    return [
        {
            "distribution": name,
            "version": _distribution(name, domain).version.partition("+")[0],  # not the build
            "licence": _licence(_distribution(name, domain)),
        }
        for name in SOURCES.get(domain, {})
    ]


def sha256(texts: Iterable[str]) -> str:
    """One hash for a domain: its documents joined by NUL, in UTF-8."""
    return hashlib.sha256("\0".join(texts).encode("utf-8")).hexdigest()


def pack(pieces: Iterable[str], glue: str, size: int) -> Iterator[str]:
    """Join consecutive pieces into documents of at least `size` characters (the last: any)."""
    kept: list[str] = []
    for piece in pieces:
        kept.append(piece)
        if sum(map(len, kept)) >= size:
            yield glue.join(kept)
            kept = []
    if kept:
        yield glue.join(kept)


# ---------------------------------------------------------------- reading


def _distribution(name: str, domain: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"domain {domain!r} reads the text of {name!r}, which is not installed:"
            " pip install 'moe_ref[course]'"
        ) from None


def _licence(distribution: metadata.Distribution) -> str:
    fields = distribution.metadata
    if "License-Expression" in fields:
        return str(fields["License-Expression"])
    classifiers = fields.get_all("Classifier") or []
    return next((_LICENCES[c] for c in classifiers if c in _LICENCES), "see its metadata")


def _files(domain: str, suffix: str) -> Iterator[str]:
    """The text of every file a domain reads, in the order of their paths."""
    skip = re.compile(r"(^|/)(tests?|testing)/|/(conftest|_?version|__config__)\.py$")
    for name, folders in SOURCES[domain].items():
        distribution = _distribution(name, domain)
        for path in sorted(str(file.as_posix()) for file in distribution.files or ()):
            if path.startswith(folders) and path.endswith(suffix) and not skip.search(path):
                data = distribution.locate_file(path).read_bytes()  # type: ignore[attr-defined]
                yield data.decode("utf-8").replace("\r\n", "\n")


# ---------------------------------------------------------------- code and prose


def _code(domain: str) -> Iterator[str]:
    """Modules without their docstrings (those are prose), cut between top-level definitions."""
    for text in _files(domain, ".py"):
        lines = text.expandtabs().split("\n")
        for owner, docstring in reversed(list(_docstrings(_parse(text)))):
            if lines[docstring.lineno - 1][: docstring.col_offset].strip():
                continue  # shares its line with the def
            alone = len(owner.body) == 1 and not isinstance(owner, ast.Module)
            stub = [" " * docstring.col_offset + "pass"] if alone else []
            lines[docstring.lineno - 1 : docstring.end_lineno] = stub
        bare = re.sub(r"\n{4,}", "\n\n\n", "\n".join(line.rstrip() for line in lines)).strip()
        for document in pack(re.split(r"\n\n\n(?=\S)", bare), "\n\n\n", 4000):
            if 200 <= len(document) <= 40_000:  # the longest are tables of numbers
                yield document + "\n"


def _prose(domain: str) -> Iterator[str]:
    """Docstrings, reduced to their paragraphs of whole sentences."""
    seen: set[str] = set()
    for text in _files(domain, ".py"):
        for _, docstring in _docstrings(_parse(text)):
            value = docstring.value.value
            fresh = [p for p in dict.fromkeys(_paragraphs(value)) if p not in seen]
            seen.update(fresh)
            while fresh and fresh[-1].endswith(":"):  # introduced a formula or an example
                fresh.pop()
            if len(document := "\n\n".join(fresh)) >= 80:
                yield document


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():  # of invalid escapes, which differ between Python versions
        warnings.simplefilter("ignore")
        return ast.parse(text)


_Owner = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@no_type_check  # called for every statement, too often to check each call under test
def _docstrings(node: ast.AST) -> Iterator[tuple[_Owner, ast.Expr]]:
    """Every definition with its docstring, in the order of the source."""
    body: list[ast.AST] = getattr(node, "body", [])
    if isinstance(node, _Owner) and body and isinstance(body[0], ast.Expr):
        first = body[0]
        if isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            yield node, first
    for part in ("body", "handlers", "orelse", "finalbody"):
        children = getattr(node, part, [])
        for child in children if isinstance(children, list) else []:
            yield from _docstrings(child)


_UNDERLINE = re.compile(r"\s*([-=~^+*])\1{2,}\s*")
_NOT_PROSE = re.compile(
    r"\s*(references|see also|examples?|doctest|methods|raises|authors?)\b", re.I
)
_ENTRIES = re.compile(
    r"\s*((other )?parameters|returns|yields|attributes|warns|keyword arguments)\b", re.I
)
_SYMBOLS = re.compile(r"[^A-Za-z ]")
_SENTENCE = re.compile(r"[A-Z][^\n]*[.!?:]")
_DEBRIS = re.compile(
    r"[$\\{}|<>=^~*@#`]|__|\b(in|[Ss]ee|by|from|of|the)[.,;)]|https?:|:\w+:|_\b|\[\d|\bpp\.|\.\.\.|arXiv|ISBN|\bdoi\b|\w\(\)?\w*\(|\b(i\.e|e\.g)\.$"
)
_INLINE = [
    (re.compile(r"\s*\[[\w .,+-]+\]_"), ""),  # citations
    (re.compile(r":[\w:+-]+:`[~!.]*([^`<]*?)\s*(<[^`>]*>)?`"), r"\1"),  # roles
    (re.compile(r"`([^`<]*?)\s*<[^`>]*>`_*"), r"\1"),  # links
    (re.compile(r"`+[~!.]*([^`]*)`+_*"), r"\1"),  # literals
    (re.compile(r"(?<![\w*])\*{1,2}(\w[^*]*?)\*{1,2}(?![\w*])"), r"\1"),  # emphasis
    (re.compile(r"\$([\w ,()/+-]*)\$"), r"\1"),  # the plainest formulas
    (re.compile(r"::$"), ":"),
    (re.compile(r"\s+"), " "),
]


def _paragraphs(docstring: str) -> Iterator[str]:
    section = ""
    for block in re.split(r"\n\s*\n", _dedent(docstring)):
        lines = block.split("\n")
        if len(lines) > 1 and _UNDERLINE.fullmatch(lines[1]):
            section, lines = lines[0], lines[2:]
        if _NOT_PROSE.match(section):
            continue
        if _ENTRIES.match(section):  # indented descriptions under the names they describe
            groups = [list(g) for own, g in groupby(lines, lambda line: line[:1] == " ") if own]
        else:
            groups = [lines]
        for group in groups:
            text = _plain(group)
            if text is not None:
                yield text


@no_type_check  # called for every paragraph
def _plain(lines: list[str]) -> str | None:
    """One paragraph on one line without its markup, or None if it is not whole sentences."""
    if not lines or len({len(line) - len(line.lstrip()) for line in lines[1:]}) > 1:
        return None  # a list, a table or code
    text = re.sub(r"^([-*•]|\d+[.)]) +", "", " ".join(lines).strip())
    if len(text.split()) < 8 or not text[0].isalpha():
        return None
    for pattern, instead in _INLINE:
        text = pattern.sub(instead, text)
    text = text.strip()
    if not _SENTENCE.fullmatch(text) or _DEBRIS.search(text):
        return None
    symbols = len(_SYMBOLS.findall(text))
    return text if symbols <= 0.08 * len(text) else None


def _dedent(docstring: str) -> str:
    # Not inspect.cleandoc: it has changed between Python versions.
    first, *rest = docstring.replace("\r\n", "\n").expandtabs().split("\n")
    margin = min((len(line) - len(line.lstrip()) for line in rest if line.strip()), default=0)
    return "\n".join([first.strip(), *(line[margin:].rstrip() for line in rest)])


# ---------------------------------------------------------------- other languages


def _messages(domain: str) -> Iterator[str]:
    """Translated phrases of gettext catalogues: no labels, placeholders, markup or leftovers."""
    words, characters = _LEAST[domain]
    debris = re.compile(r"[{}<>|\\_=]|%[\w(]|https?:|\$|&\w+;")
    for text in _files(domain, ".json"):
        for key, translations in json.loads(text).items():
            original = key.rpartition("\x04")[2]  # behind the context
            for translation in translations if key else []:
                plain = translation.replace("`", "").replace("\u200b", "")
                sentences = [" ".join(s.split()) for s in _SENTENCE_END.split(plain)]
                phrase = " ".join(s for s in sentences if s and not debris.search(s))
                letters = [c for c in phrase if c.isalpha()]
                script = sum(bool(_SCRIPT[domain].match(c)) for c in letters)
                if (
                    translation != original
                    and len(phrase) >= characters
                    and len(phrase.split()) >= words
                    and script >= 0.6 * len(letters)
                ):
                    yield phrase


# ---------------------------------------------------------------- a reader's own files


def _visible_files(root: Path) -> list[Path]:
    files = [path for path in root.rglob("*") if path.is_file()]
    hidden = (any(part.startswith(".") for part in path.relative_to(root).parts) for path in files)
    visible = [path for path, skip in zip(files, hidden, strict=True) if not skip]
    return sorted(visible, key=lambda path: path.relative_to(root).as_posix())


def _documents_of(file: Path) -> Iterator[str]:
    try:
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    if "\0" in text:
        raise ValueError(f"{file} is not text: it holds NUL characters; remove or convert it")
    pieces: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.split("\n")
        pieces += pack(lines, "\n", 2000) if len(paragraph) > 4000 else [paragraph]
    return pack([piece.strip("\n") for piece in pieces if piece.strip()], "\n\n", 2000)
