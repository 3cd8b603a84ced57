"""Shapes are checked at run time in every test, and a notebook's cells stay together."""

from pathlib import Path

import hypothesis
import jaxtyping
import pytest

ROOT = Path(__file__).parent

# Every module that names a shape, before anything imports it: from here on each of its annotated
# functions checks what it is given and what it returns. (The others have no shapes to check, and
# the generators of text among them would take minutes, being thousands of small functions.)
SHAPED = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.glob("moe_ref/**/*.py")
    if "import jaxtyping" in path.read_text() or "from jaxtyping" in path.read_text()
]
# As in Python itself, an int will do where a float is asked for.
jaxtyping.install_import_hook(
    SHAPED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

# Derandomised, so that a failure is one for everybody; no deadline, since workers share the cores.
hypothesis.settings.register_profile(
    "moe_ref", derandomize=True, deadline=None, max_examples=50, database=None
)
hypothesis.settings.load_profile("moe_ref")


@pytest.fixture
def unchecked(monkeypatch):
    """As for users: the suite's own checks of shapes would speak up before the library does."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no worker is left alone with one at the end."""
    long = ("test_other_parameters", "test_compile", "test_tiny", "test_every_control")
    items.sort(key=lambda item: not any(name in item.nodeid for name in long))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under pytest-xdist's -n: tests go out one by one, but a notebook's cells share a kernel.

    So do the tests that read the large domains of text, which takes half a minute.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if "scripts/test_tiny.py" in nodeid or "scripts/test_text.py" in nodeid:
                return "large text"
            return nodeid.split("::")[0] if ".ipynb::" in nodeid else nodeid

    return Scheduling(config, log)
