"""The set-up cell of the notebooks: what it accepts, what it refuses and how it says so."""

import math
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from moe_ref.course import lesson

PARAMETERS = """
n_experts: int = 8  # experts
k: int = 2  # experts per token
capacity_factor: float = 1.25  # room per expert
activation: str = "relu"  # of the experts
shared: bool = False  # a shared expert
device: str = "auto"  # where to compute
seed: int = 0  # of everything random
"""
RULES = {
    "n_experts": (1, 512),
    "k": (1, "n_experts"),
    "capacity_factor": (0.1, 100.0),
    "activation": ["relu", "gelu", "swiglu"],
    "shared": bool,
}


def session(*cells: str) -> dict:
    """The namespace of a live session in which these cells were run."""
    namespace: dict = {"In": [""]}
    for cell in cells:
        namespace["In"].append(cell)
        exec(cell, namespace)
    return namespace


def injected(assignment: str) -> dict:
    """A session as papermill makes it."""
    return session(PARAMETERS, f"# Parameters\n{assignment}\n")


def test_good_parameters_give_the_device():
    assert lesson.start(session(PARAMETERS), **RULES) == lesson.find_device("auto")


def test_a_plain_script_needs_no_record_of_cells():
    namespace: dict = {}
    exec(PARAMETERS, namespace)
    assert isinstance(lesson.start(namespace, **RULES), torch.device)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("k = 9", "k=9 is more than n_experts=8"),
        ("k = 0", "k=0 is less than 1"),
        ("k = -3", "k=-3 is less than 1"),
        ("k = 'three'", "k='three' is not an int"),
        ("k = 2.0", "k=2.0 is not an int"),
        ("k = True", "k=True is not an int"),
        ("k = None", "k=None is not an int"),
        ("k = [1, 2]", r"k=\[1, 2\] is not an int"),
        ("n_experts = 100000", "n_experts=100000 is more than 512"),
        ("capacity_factor = 'big'", "capacity_factor='big' is not a number"),
        ("capacity_factor = float('nan')", "capacity_factor=nan is not from 0.1 to 100.0"),
        ("capacity_factor = float('inf')", "capacity_factor=inf is more than 100.0"),
        ("activation = 'tanh'", "activation='tanh' is not one of 'relu', 'gelu', 'swiglu'"),
        ("activation = 1", "activation=1 is not a text"),
        ("shared = 'yes'", "shared='yes' is not true or false"),
        ("shared = 1", "shared=1 is not true or false"),
        ("device = 'gpu'", "device='gpu' is not one of 'auto', 'cpu'"),
        ("device = 'cuda:99'", "device='cuda:99' is not on this machine, which has .*cpu"),
        ("seed = -1", "seed=-1 is less than 0"),
        ("seed = 2**32", "seed=4294967296 is more than 4294967295"),
        ("n_expert = 4", "n_expert is not a parameter of this notebook: did you mean n_experts?"),
        ("zzz = 4", "zzz is not a parameter of this notebook: it has n_experts, k, "),
    ],
)
def test_a_bad_parameter_is_refused_with_its_name_value_and_what_is_right(assignment, message):
    with pytest.raises(ValueError, match=message):
        lesson.start(injected(assignment), **RULES)


def test_a_refused_parameter_changes_no_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="k=9"):
        lesson.start(injected("k = 9"), **RULES)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(
    ("assignment", "name", "value"),
    [
        ("k = 8", "k", 8),
        ("shared = 'true'", "shared", True),
        ("shared = 'FALSE'", "shared", False),
        ("capacity_factor = 2", "capacity_factor", 2.0),
        ("device = 'cpu'", "device", "cpu"),
    ],
)
def test_a_good_value_is_written_back_in_its_declared_type(assignment, name, value):
    namespace = injected(assignment)
    lesson.start(namespace, **RULES)
    assert namespace[name] == value
    assert type(namespace[name]) is type(value)


def test_infinity_is_a_value_where_the_range_says_so():
    namespace = injected("capacity_factor = float('inf')")
    lesson.start(namespace, **RULES | {"capacity_factor": (0, math.inf)})
    assert namespace["capacity_factor"] == math.inf


def test_the_set_up_cell_runs_again_after_the_notebook_has_defined_names_of_its_own():
    later = "steps: int = 3\nn_expert = 4"
    lesson.start(session(PARAMETERS, later), **RULES)


def test_an_edited_parameters_cell_counts_from_its_last_run():
    wrong = PARAMETERS.replace("k: int = 2", "kk: int = 2")
    with pytest.raises(ValueError, match=r"kk is not a parameter .*: did you mean k\?"):
        lesson.start(session(PARAMETERS, wrong), **RULES)
    lesson.start(session(PARAMETERS, wrong, PARAMETERS), **RULES)


def test_a_cell_that_is_no_python_is_passed_over():
    namespace = session(PARAMETERS)
    namespace["In"].append("%timeit x")
    lesson.start(namespace, **RULES)


def test_rules_and_declarations_must_match():
    with pytest.raises(ValueError, match="depth has a rule, but the parameters cell does not"):
        lesson.start(session(PARAMETERS), **RULES, depth=(1, 2))
    with pytest.raises(ValueError, match="width is not a parameter"):
        lesson.start(session(PARAMETERS + "width: int = 3"), **RULES)
    with pytest.raises(ValueError, match="width is declared, but has no value"):
        lesson.start(session(PARAMETERS + "width: int"), **RULES, width=(1, 2))
    with pytest.raises(ValueError, match=r"width is declared as .*list.*: use int, float"):
        lesson.start(session(PARAMETERS + "width: list = []"), **RULES, width=(1, 2))


def drawn() -> tuple:
    return random.random(), np.random.rand(), torch.rand(1, device="cpu").item()


def test_the_seed_fixes_every_generator():
    draws = []
    for assignment in ("seed = 3", "seed = 3", "seed = 4"):
        lesson.start(injected(assignment), **RULES)
        draws.append(drawn())
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[1], draws[2], strict=True))


def test_a_device_that_is_not_the_cpu_becomes_the_default(monkeypatch):
    monkeypatch.setattr(lesson, "find_device", lambda name: torch.device("meta"))
    lesson.start(session(PARAMETERS), **RULES)
    try:
        assert torch.ones(2).device.type == "meta"
    finally:
        monkeypatch.undo()
        lesson.start(injected("device = 'cpu'"), **RULES)
    assert torch.ones(2).device.type == "cpu"


def test_auto_takes_cuda_where_there_is_one(monkeypatch):
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert lesson.find_device("auto").type == kind


def test_a_numbered_device_must_be_among_those_present(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert lesson.find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="'cpu', 'cuda:0', 'cuda:1'"):
        lesson.find_device("cuda:2")


def test_jupyter_shows_a_bad_parameter_in_one_line():
    with pytest.raises(ValueError) as caught:
        lesson.start(injected("k = 9"), **RULES)
    assert caught.value._render_traceback_() == ["ValueError: k=9 is more than n_experts=8"]


@pytest.mark.parametrize(
    ("holds", "verdict"),
    [
        (True, "holds"),
        (np.bool_(True), "holds"),
        (torch.tensor(1.0) > 0, "holds"),
        (False, "does not hold in this run"),
        (torch.tensor(1.0) < 0, "does not hold in this run"),
    ],
)
def test_a_claim_is_reported_and_never_raises(holds, verdict, capsys):
    lesson.claim("sorting is at most twice as slow", holds)
    assert capsys.readouterr().out == f"claim: sorting is at most twice as slow: {verdict}\n"


def test_compare_prints_that_results_are_equal(capsys):
    x = torch.randn(4, 3)
    lesson.compare("outputs", x + 1e-7, x)
    lesson.compare("experts", torch.tensor([1, 2]), [1, 2])
    lesson.compare("nothing", torch.empty(0, 3), torch.empty(0, 3))
    lesson.compare("zeros", torch.zeros(2), torch.zeros(2))
    lesson.compare("infinities", [1.0, math.inf], [1.0, math.inf])
    assert capsys.readouterr().out.splitlines() == [
        "outputs: equal (relative difference < 1e-05)",
        "experts: identical",
        "nothing: equal (relative difference < 1e-05)",
        "zeros: equal (relative difference < 1e-05)",
        "infinities: equal (relative difference < 1e-05)",
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([1.0, 2.0], [1.0, 2.1], r"at \[1\]: 2 against 2.1 \(relative difference 4.8e-02, allowed"),
        ([[0.0, 1.0], [5.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]], r"at \[1, 0\]: 5 against 0"),
        ([1, 2], [1, 3], "at .1.: 2 against 3"),
        ([True], [False], "not equal"),
        ([1e-9], [0.0], "not equal.*1.0e-09"),
        ([math.nan], [math.nan], "not equal"),
        ([1.0], [math.inf], "not equal"),
        ([math.inf], [-math.inf], "not equal"),
        ([1.0], [[1.0]], r"shape \(1,\) against \(1, 1\)"),
    ],
)
def test_compare_raises_with_the_largest_difference(ours, theirs, message):
    tolerance = 1e-12 if ours == [1e-9] else 1e-5
    with pytest.raises(AssertionError, match=message):
        lesson.compare("x", ours, theirs, tolerance=tolerance)


def test_compare_measures_against_the_largest_value_not_each(capsys):
    lesson.compare("x", [1000.0, 1e-3], [1000.0, 0.0])
    with pytest.raises(AssertionError):
        lesson.compare("x", [1000.0, 0.1], [1000.0, 0.0])


def test_race_takes_turns_and_gives_medians_per_call():
    calls = []
    runners = {
        "short": lambda: (calls.append("short"), time.sleep(0.004)),
        "long": lambda: (calls.append("long"), time.sleep(0.012)),
    }
    seconds = lesson.race(runners, seconds=0.1)
    assert list(seconds) == ["short", "long"]
    assert 0.004 <= seconds["short"] < seconds["long"]
    assert seconds["long"] >= 0.012
    timed = calls[4:]  # after two calls of each to warm up
    rounds = [timed[i : i + 2] for i in range(0, len(timed), 2)]
    assert len(rounds) >= 3
    assert all(sorted(turn) == ["long", "short"] for turn in rounds)


def test_measure_repeats_what_is_too_short_for_the_clock():
    count = 0

    def run():
        nonlocal count
        count += 1

    assert 0 < lesson.measure(run, seconds=0.02) < 1e-4
    assert count > 1000


def test_the_environment_is_described_without_a_path():
    found = lesson.environment()
    assert found["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] == torch.__version__
    assert int(found["cores"]) >= 1
    assert found["memory"].endswith("GiB")
    assert all(value and "/" not in value for value in found.values())


def test_importing_the_lesson_needs_no_notebook_library():
    code = (
        "import sys, moe_ref.course.lesson;"
        "print([m for m in ('matplotlib', 'pandas', 'IPython', 'sklearn') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
