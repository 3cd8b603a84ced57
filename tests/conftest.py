"""Shapes are checked at run time in every test, and a notebook's cells stay together."""

import hypothesis
import jaxtyping
import pytest

# Before anything imports moe_ref: from here on every annotated argument and result is checked.
jaxtyping.install_import_hook("moe_ref", "beartype.beartype")

# Derandomised, so that a failure is one for everybody; no deadline, since two workers share cores.
hypothesis.settings.register_profile(
    "moe_ref", derandomize=True, deadline=None, max_examples=50, database=None
)
hypothesis.settings.load_profile("moe_ref")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Send all cells of a notebook to one xdist worker, in order: they share a kernel."""
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.xdist_group(item.path.name))
