import IPython.display
import pytest


@pytest.fixture
def shown(monkeypatch):
    """The figures that a notebook would display."""
    caught = []
    monkeypatch.setattr(IPython.display, "display", caught.append)
    return caught
