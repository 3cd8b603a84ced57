"""What a notebook of the course calls in its set-up cell, and the few tools later cells share.

`start` checks the notebook's parameters, seeds everything and picks the device. `compare` states
that two results are the same, `race` and `measure` time code, `claim` says whether a statement
about time holds, `environment` describes the machine.
"""

import ast
import difflib
import importlib.metadata
import math
import os
import platform
import random
import statistics
import timeit
from collections.abc import Callable, Iterable, Mapping
from time import perf_counter
from typing import Any

import numpy as np
import torch

Rule = tuple[Any, Any] | list[Any] | type

# Known to every notebook; numpy takes no seed beyond 32 bits.
_COMMON: dict[str, Rule] = {"device": str, "seed": (0, 2**32 - 1)}
_TYPES: dict[type, str] = {int: "an int", float: "a number", bool: "true or false", str: "a text"}


def start(namespace: dict[str, Any], **rules: Rule) -> torch.device:
    """Check a notebook's parameters, seed `random`, numpy and torch, and return the device to use.

    Call it as `device = lesson.start(globals(), n_experts=(1, 512), k=(1, "n_experts"))` in the
    cell after the parameters cell, which declares each one as `k: int = 2  # experts per token`.

    A rule is a tuple (smallest and largest allowed; a number or the name of another parameter), a
    list (the allowed values) or a type (anything of it). `device: str` and `seed: int` need none.
    Whole numbers given for a float become floats, and "true" or "false" for a bool become bools:
    the values are written back into `namespace`. Unless it is the CPU, the device also becomes
    torch's default, so the cells that follow create their tensors there.

    Raises ValueError, naming the parameter, its value and what would be right: for a wrong type, a
    value out of range, a device that is not there, and a name the notebook does not declare.
    """
    try:
        return _start(namespace, rules)
    except ValueError as error:
        raise brief(error) from None


def _start(namespace: dict[str, Any], rules: dict[str, Rule]) -> torch.device:
    cells = _executed_cells(namespace)
    declared = _declared(namespace, cells, rules)
    _refuse_unknown([*declared, *_injected(cells)], [*rules, *_COMMON])
    for name in rules:
        if name not in declared:
            raise ValueError(f"{name} has a rule, but the parameters cell does not declare it")
    rules = {name: rule for name, rule in {**rules, **_COMMON}.items() if name in declared}

    for name in rules:
        namespace[name] = _typed(name, namespace, declared[name])
    for name, rule in rules.items():
        _check(name, rule, namespace)

    device = find_device(namespace["device"] if "device" in declared else "auto")
    # None takes back what an earlier run of the cell set; "cpu" would slow down every call.
    torch.set_default_device(None if device.type == "cpu" else device)
    _seed(namespace["seed"] if "seed" in declared else 0)
    return device


def find_device(name: str) -> torch.device:
    """The device called `name` ("auto": the first CUDA device, or else the CPU), if it is here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # any kind that is not in the table below
    here = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if device.type not in here:
        raise ValueError(f"device={name!r} is not one of 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    if (device.index or 0) >= here[device.type]:
        found = [f"{kind}:{i}" for kind in ("cuda", "mps") for i in range(here[kind])]
        raise ValueError(f"device={name!r} is not on this machine, which has {['cpu', *found]}")
    return device


def brief(error: Exception) -> Exception:
    """The same error, of which Jupyter shows the message only, without the traceback."""
    shown = f"{type(error).__name__}: {error}".splitlines()
    error._render_traceback_ = lambda: shown  # type: ignore[attr-defined]  # IPython looks for it
    return error


def claim(what: str, holds: object) -> None:
    """Print whether a statement about time holds in this run; it may not on a busy machine.

    `scripts/course.py store` stores no notebook in which one does not hold, so what a notebook's
    text says of time may rest on its claims. What is not a timing is an `assert`.
    """
    print(f"claim: {what}: {'holds' if holds else 'does not hold in this run'}")


def compare(what: str, ours: Any, theirs: Any, *, tolerance: float = 1e-5) -> None:
    """Print that two results are equal, or raise AssertionError with the largest difference.

    Tensors (or arrays, lists, numbers) of whole numbers or booleans must be identical. Others may
    differ, relative to the largest absolute value of `theirs`, by less than `tolerance`. Equal
    infinities count as equal; a NaN never does.
    """
    a, b = (torch.as_tensor(x).detach().cpu() for x in (ours, theirs))
    if a.shape != b.shape:
        raise AssertionError(f"{what}: shape {tuple(a.shape)} against {tuple(b.shape)}")
    exact = not (a.is_floating_point() or b.is_floating_point())
    a, b = a.double(), b.double()
    gap = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=math.inf)
    scale = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
    worst = gap.max().item() if gap.numel() else 0.0
    relative = worst / scale if worst and scale else worst
    if worst if exact else not relative < tolerance:
        at = np.unravel_index(int(gap.argmax()), gap.shape)
        raise AssertionError(
            f"{what}: not equal; at {[int(i) for i in at]}: {a[at].item():.7g} against "
            f"{b[at].item():.7g} (relative difference {relative:.1e}, allowed {tolerance:g})"
        )
    print(f"{what}: " + ("identical" if exact else f"equal (relative difference < {tolerance:g})"))


def race(runners: Mapping[str, Callable[[], object]], *, seconds: float = 0.5) -> dict[str, float]:
    """Median seconds per call of several functions, timed in turns for about `seconds` each.

    Taking turns lets a slow moment of the machine fall on all of them alike. The order is drawn
    anew in each round: what runs first after a call that floods the caches is slower. Each is
    called twice before the clock starts. Work on an accelerator is waited for.
    """
    timers = {name: timeit.Timer(run, timer=_clock) for name, run in runners.items()}
    calls = {}
    for name, timer in timers.items():
        timer.timeit(1)  # the first call pays for caches and compilation
        calls[name] = max(1, int(0.002 / max(timer.timeit(1), 1e-7)))  # a sample of 2 ms or more
    samples: dict[str, list[float]] = {name: [] for name in timers}
    begin, rounds, shuffled = perf_counter(), 0, random.Random(0)
    while rounds < 3 or perf_counter() - begin < seconds * len(timers):
        for name in shuffled.sample(list(timers), len(timers)):
            samples[name].append(timers[name].timeit(calls[name]) / calls[name])
        rounds += 1
    return {name: statistics.median(times) for name, times in samples.items()}


def measure(run: Callable[[], object], *, seconds: float = 0.5) -> float:
    """Median seconds per call of one function: a `race` with one runner."""
    return race({"": run}, seconds=seconds)[""]


def environment() -> dict[str, str]:
    """What the course runs on here: versions, cores, threads, memory and accelerators."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus]
    if torch.backends.mps.is_available():
        names.append("Apple (mps)")
    return {
        "Python": platform.python_version(),
        "moe_ref": _version("moe_ref"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(cores),
        "threads": str(torch.get_num_threads()),
        "memory": _memory(),
        "GPU": ", ".join(names) or "none",
    }


def _executed_cells(namespace: Mapping[str, Any]) -> list[tuple[str, list[ast.stmt]]]:
    """Source and statements of every cell run so far: IPython keeps them in `In`."""
    cells = []
    for source in namespace.get("In", []):
        try:
            cells.append((source, ast.parse(source).body))
        except SyntaxError:
            continue
    return cells


def _declared(
    namespace: Mapping[str, Any], cells: Iterable[tuple[str, list[ast.stmt]]], rules: Iterable[str]
) -> dict[str, type]:
    """Names and types from the parameters cell, not from what the notebook annotated since.

    That cell is the latest of nothing but annotated names, at least one of them known.
    """
    annotations = namespace.get("__annotations__", {})
    known = {*rules, *_COMMON}
    latest = set(annotations)
    for _, body in cells:
        names = {ast.unparse(s.target) for s in body if isinstance(s, ast.AnnAssign)}
        if len(names) == len(body) and names & known:
            latest = names
    return {name: kind for name, kind in annotations.items() if name in latest}


def _injected(cells: Iterable[tuple[str, list[ast.stmt]]]) -> set[str]:
    """Names that papermill sets, in the cell it puts in; papermill itself lets any name pass."""
    names: set[str] = set()
    for source, body in cells:
        if source.startswith("# Parameters\n"):
            names = {t.id for s in body for t in getattr(s, "targets", []) if hasattr(t, "id")}
    return names


def _refuse_unknown(names: Iterable[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(known)}"
            raise ValueError(f"{name} is not a parameter of this notebook: {hint}")


def _typed(name: str, namespace: Mapping[str, Any], kind: type) -> Any:
    if name not in namespace:
        raise ValueError(f"{name} is declared, but has no value")
    value = namespace[name]
    if name == "device" and isinstance(value, torch.device):
        return str(value)  # what an earlier run of this cell made of it
    if kind not in _TYPES:
        raise ValueError(f"{name} is declared as {kind}: use int, float, bool or str")
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"  # papermill -p flag true arrives as a text
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name}={value!r} is not {_TYPES[kind]}")
    return value


def _check(name: str, rule: Rule, values: Mapping[str, Any]) -> None:
    value = values[name]
    if isinstance(rule, list) and value not in rule:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, rule))}")
    if isinstance(rule, tuple):
        low, high = (values[end] if isinstance(end, str) else end for end in rule)
        names = [f"{end}=" if isinstance(end, str) else "" for end in rule]
        if value < low:
            raise ValueError(f"{name}={value} is less than {names[0]}{low}")
        if value > high:
            raise ValueError(f"{name}={value} is more than {names[1]}{high}")
        if value != value:  # a NaN is neither, and never in range
            raise ValueError(f"{name}={value} is not from {names[0]}{low} to {names[1]}{high}")


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _clock() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return perf_counter()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _memory() -> str:
    if not hasattr(os, "sysconf"):
        return "unknown"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
