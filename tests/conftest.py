"""Shared fixtures. Nothing here imports `retention` at module level: the type checker must be installed first."""

import gc
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tensors here are tiny: a second thread only waits for the first

LONGEST = ("training", "scripts", "evaluation")
"""Folders whose files run for longest. They start first, lest one process ends alone with them."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.parent.name not in LONGEST)


def pytest_collection_finish():
    """Set aside all that lives until the end: each full collection walked through it, for a second or so."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # nanobind would report what is never collected as leaks


@pytest.fixture
def unrendered(monkeypatch):
    """Figures are built and their numbers written, but nothing is painted: for tests that look at no picture."""
    from matplotlib.figure import Figure

    def savefig(self, place, **how):
        if isinstance(place, str | Path):
            Path(place).write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture(scope="session")
def embedded_model():
    from retention.embedded import load_model

    return load_model().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def embedded_processor():
    from retention.embedded import load_processor

    return load_processor()
