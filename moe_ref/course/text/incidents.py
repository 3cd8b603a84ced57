"""The security incident desk: labelled requests of five kinds, generated, never two alike.

A stolen laptop brings the desk inventory records, session logs, shell commands, policy text and
explanations to a person. The words and the grammar stand in `data/incidents.txt`; this file draws
from them. The only source of chance is `random.Random(...).random()` and integer arithmetic, so
the text is the same on every Python version and platform.
"""

import datetime
import functools
import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, no_type_check

from ..._data import data_file

T = TypeVar("T")

KINDS = ("inventory", "session_log", "shell", "policy", "explanation")


@dataclass(frozen=True)
class Incident:
    """One request to the desk: its `kind`, one of `KINDS`, and its `text`."""

    kind: str
    text: str


def incidents(seed: int, n: int) -> list[Incident]:
    """The first `n` requests of the endless sequence number `seed`.

    Request i depends on `seed` and i alone. Each run of five holds every kind once, in random
    order. Raises ValueError if `n` is negative.
    """
    if n < 0:
        raise ValueError(f"n={n} must be at least 0")
    return [_incident(seed, index) for index in range(n)]


def _incident(seed: int, index: int) -> Incident:
    block, place = divmod(index, len(KINDS))
    kind = _Case(f"order {seed} {block}").shuffled(KINDS)[place]
    case = _Case(f"request {seed} {index}")
    case.meet()
    return Incident(kind, _MAKERS[kind](case))


@no_type_check  # at run time, where tests check every call: there are millions, and no shapes
class _Case:
    """One request in the making: its chance, its facts and its clock."""

    def __init__(self, name: str) -> None:
        digest = hashlib.sha256(name.encode("utf-8")).digest()
        self.random = random.Random(int.from_bytes(digest[:8], "big")).random
        self.facts: dict[str, str] = {}
        self.clock = datetime.datetime(2023, 1, 1)

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        keyed = [(self.random(), place) for place in range(len(options))]
        return [options[place] for _, place in sorted(keyed)]

    def some(self, options: Sequence[T], low: int, high: int) -> list[T]:
        """From `low` to `high` different ones, in random order."""
        return self.shuffled(options)[: self.between(low, high)]

    def digits(self, alphabet: str, length: int) -> str:
        return "".join(self.pick(alphabet) for _ in range(length))

    def fill(self, text: str) -> str:
        """`text` with every slot filled, and the slots of what filled it."""

        def slot(match: re.Match[str]) -> str:
            space, capital, name, optional = match.groups()
            if optional and self.chance(0.5):
                return ""
            value = self.look_up(name)
            if capital:
                value = value[:1].upper() + value[1:]
            return value if value[:1] in _CLOSERS else space + value

        return _SLOT.sub(slot, text)

    def look_up(self, name: str) -> str:
        if name.startswith("any_"):  # not the one that this case is about
            name = name[4:]
        elif name in self.facts:
            return self.facts[name]
        if name[0].isdigit():
            low, high = name.split("-")
            return str(self.between(int(low), int(high)))
        if name in _DRAWS:
            return _DRAWS[name](self)
        return self.fill(self.pick(_grammar()[name]))

    def say(self, name: str) -> str:
        return self.fill(f"«{name}»")

    def meet(self) -> None:
        """Draw the person, the device and the moment that the whole request is about."""
        self.clock += datetime.timedelta(seconds=self.between(0, 3 * 365 * 86400))
        first, last = self.say("first"), self.say("last")
        ascii_first = first.lower().replace("-", "")
        tail = self.digits("0123456789", self.pick((0, 0, 1, 2)))
        forms = (ascii_first[0] + last.lower(), f"{ascii_first}.{last.lower()}", last.lower()[:6])
        self.facts = {name: self.say(name) for name in _FIXED.split()}
        company, vendor = self.facts["company"], self.facts["vendor"]
        login = self.pick(forms) + tail
        self.facts |= {
            "first": first,
            "last": last,
            "name": f"{first} {last}",
            "user": login,
            "email": f"{login}@{company}",
            "host": self.say("host_form").lower(),
            "manager": self.fill("«any_first» «any_last»"),
            "sensor": self.say("hex8"),
            "home": _address(self),
            "away": _address(self),
            "lat": f"{self.between(1, 69)}.{self.between(10, 99)}",
            "lon": f"{self.between(1, 99)}.{self.between(10, 99)}",
            "actor2": self.say("first"),
            "dc": company.partition(".")[0],
            "site_l": self.facts["site"].lower(),
            "dept_l": self.facts["dept"].lower(),
            "model": f"{vendor} {self.facts['line']} {self.between(11, 17)} G{self.between(1, 9)}",
            "ticket": self.fill("«ticket_form»«1000-99999»"),
            "year": str(self.clock.year),
            "iso_day": self.clock.date().isoformat(),
        }
        self.facts["winhost"] = self.facts["host"].upper()[:15]

    def tick(self) -> None:
        """Move the clock on: mostly by seconds, now and then by minutes or hours."""
        reach = self.pick((3, 20, 20, 90, 90, 600, 7200))
        self.clock += datetime.timedelta(seconds=self.between(0, reach))


# ---------------------------------------------------------------- words


_SLOT = re.compile(r"( ?)«(\^?)([a-z_0-9-]+)(\??)»")
_CLOSERS = (",", ";")  # a part that opens with one follows without a space
_HEX = "0123456789abcdef"
_MONTHS = "JanFebMarAprMayJunJulAugSepOctNovDec"
_FIXED = "company site dept vendor line os_name app svc ns serial asset ip mac server"


@functools.cache
def _grammar() -> dict[str, tuple[str, ...]]:
    rules: dict[str, list[str]] = {}
    words = False
    for line in data_file("incidents.txt").read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"\[([a-z_0-9]+)( words)?\]", line):
            rules[heading[1]] = alternatives = []
            words = bool(heading[2])
        elif rules:
            alternatives += line.split() if words else [line.replace("¶", "\n")]
    return {name: tuple(alternatives) for name, alternatives in rules.items()}


def _address(case: _Case) -> str:
    """Somewhere outside: only networks set aside for documentation."""
    return f"{case.pick(('192.0.2', '198.51.100', '203.0.113'))}.{case.between(1, 254)}"


def _hex(length: int) -> Callable[[_Case], str]:
    return lambda case: case.digits(_HEX, length)


def _time(form: str) -> Callable[[_Case], str]:
    # Not strftime: its names of months follow the locale.
    def show(case: _Case) -> str:
        t = case.clock
        month = _MONTHS[3 * t.month - 3 : 3 * t.month]
        return form.format(t=t, month=month, ms=case.between(0, 999), epoch=_epoch(t))

    return show


def _epoch(moment: datetime.datetime) -> int:
    return int((moment - datetime.datetime(1970, 1, 1)).total_seconds())


_DRAWS: dict[str, Callable[[_Case], str]] = {
    "hex4": _hex(4),
    "hex8": _hex(8),
    "hex12": _hex(12),
    "hexup": lambda case: case.digits("0123456789ABCDEF", 16),
    "b64": lambda case: case.digits(f"{_HEX}GHJKMNPQRSTVWXYZgjkmnpqrstvwxyz+/", 43),
    "serial": lambda case: case.digits("BCDFGHJKLMNPQRSTVWXZ0123456789", case.pick((7, 10, 12))),
    "wan": lambda case: case.facts.get(case.pick(("home", "home", "away", ""))) or _address(case),
    "wan3": lambda case: case.say("wan").rpartition(".")[0],
    "mac": lambda case: ":".join(case.digits(_HEX, 2) for _ in range(6)),
    "size": lambda case: str(int(10 ** (2 + 7 * case.random()))),
    "app2": lambda case: case.pick([app for app in _grammar()["app"] if app != case.facts["app"]]),
    "someone": lambda case: case.fill(
        case.pick(("«user»", "«badname»", "svc-«app»", "administrator"))
    ),
    "badname": lambda case: case.pick(
        ("admin", "test", "oracle", "guest", "backup", "support", "pi")
    ),
    "clock": lambda case: f"{case.between(0, 23):02}:{case.between(0, 59):02}",
    "date": lambda case: (
        (case.clock + datetime.timedelta(days=case.between(-40, 40))).date().isoformat()
    ),
    "moment": lambda case: (
        f"{case.clock - datetime.timedelta(seconds=case.between(0, 2500000)):%Y-%m-%dT%H:%M:%S}Z"
    ),
    "sys": _time("{month} {t.day:2} {t:%H:%M:%S}"),
    "iso": _time("{t:%Y-%m-%dT%H:%M:%S}Z"),
    "iso2": _time("{t:%Y-%m-%dT%H:%M:%S}.{ms:03}+00:00"),
    "clf": _time("{t:%d}/{month}/{t:%Y:%H:%M:%S} +0000"),
    "wints": _time("{t:%Y-%m-%d %H:%M:%S},{ms:03}"),
    "epoch": _time("{epoch}.{ms:03}"),
}


# ---------------------------------------------------------------- the five kinds


def _session_log(case: _Case) -> str:
    """Lines of one to three systems, in the order of their times."""
    sources = [name for name in _grammar() if name.startswith("log_") and name != "log_note"]
    sources = case.some(sources, 1, 3)
    lines = []
    for _ in range(case.between(4, 16)):
        case.tick()
        lines.append(case.say(case.pick(sources)))
    note = [case.say("log_note")] if case.chance(0.4) else []
    return "\n".join(note + lines if case.chance(0.7) else lines + note)


def _shell(case: _Case) -> str:
    """One line, or a script with its preparation, comments and steps."""
    if case.chance(0.2):
        return case.say("sh_stmt")
    lines = [case.say("shell_note")] if case.chance(0.5) else []
    lines += [case.fill(text) for text in case.some(_grammar()["sh_set"], 0, 3)]
    for text in case.some(_grammar()["sh_stmt"], 2, 6):
        if case.chance(0.25):
            lines.append(case.say("sh_comment"))
        lines.append(case.fill(text))
    return "\n".join(lines)


def _policy(case: _Case) -> str:
    """A headed section: numbered clauses or running paragraphs."""
    rules = case.some(_grammar()["clause"], 3, 7)
    clauses = [case.fill(text) for text in rules]
    marks = case.pick(("({})", "{}.", "({letter})", "{letter})", "", ""))
    if not marks:
        cut = case.between(1, len(clauses))
        body = "\n\n".join(" ".join(part) for part in (clauses[:cut], clauses[cut:]) if part)
    else:
        numbered = enumerate(clauses, 1)
        body = "\n".join(f"{marks.format(i, letter='abcdefg'[i - 1])} {c}" for i, c in numbered)
    return f"{case.say('policy_head')}\n{body}"


def _explanation(case: _Case) -> str:
    """A message to a person: what happened, what was done, why, and what to do."""
    did = case.some(_grammar()["did"], 1, 3)
    paragraphs = [" ".join([case.say("opening"), *map(case.fill, did)])]
    topics = ("sorry", "why", "means", "unknown", "todo", "next")
    chosen = case.some(topics, 2, 5)
    if case.chance(0.7):
        chosen.sort(key=topics.index)
    for topic in chosen:
        sentences = case.some(_grammar()[topic], 1, 2)
        text = " ".join(map(case.fill, sentences))
        if case.chance(0.4):
            paragraphs[-1] += " " + text
        else:
            paragraphs.append(text)
    if case.chance(0.85):
        paragraphs.insert(0, case.say("greet"))
    if case.chance(0.85):
        paragraphs.append(case.say("close"))
    return "\n\n".join(paragraphs)


def _inventory(case: _Case) -> str:
    """JSON: a device, several, a query or a change; what is optional is there or not."""
    record = _thin(case, json.loads(case.say("inventory")))
    record = _respell(record, case.pick(_SPELLINGS))
    if case.chance(0.3):
        return json.dumps(record, separators=(",", ":"))
    return json.dumps(record, indent=case.pick((None, 1, 2, 2, 2, 4)))


def _thin(case: _Case, value: Any) -> Any:
    """Leave out some fields and elements, reorder fields, and blank a few values."""
    if isinstance(value, dict):
        n = len(value)
        low, high = (n, n) if n <= 4 else ((n + 1) // 2, n) if n <= 8 else (n // 3, 3 * n // 4)
        kept = case.some(list(value), low, high)
        return {key: _thin(case, value[key]) for key in kept}
    if isinstance(value, list):
        return [_thin(case, inner) for inner in value[: case.between(1, len(value))]]
    return None if case.chance(0.03) else value


def _camel(key: str) -> str:
    first, *rest = key.split("_")
    return first + "".join(word.title() for word in rest)


_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda key: key,
    _camel,
    lambda key: key.replace("_", "-"),
)


def _respell(value: Any, spelling: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {spelling(key): _respell(inner, spelling) for key, inner in value.items()}
    return [_respell(inner, spelling) for inner in value] if isinstance(value, list) else value


_MAKERS: dict[str, Callable[[_Case], str]] = {
    "inventory": _inventory,
    "session_log": _session_log,
    "shell": _shell,
    "policy": _policy,
    "explanation": _explanation,
}
