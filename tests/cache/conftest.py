"""Small pages, so that heads of a few entries fill some and leave some over."""

import pytest


@pytest.fixture(autouse=True)
def page(request, monkeypatch):
    from retention.cache import storage

    monkeypatch.setattr(storage, "PAGE", getattr(request, "param", 2))
