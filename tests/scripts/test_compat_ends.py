"""Which versions `make test-compat` installs: the bounds that pyproject.toml declares."""

from scripts.test_compat import TORCHVISION, declared, pins


def test_the_oldest_end_is_the_declared_one():
    torch, transformers = declared("torch")[1], declared("transformers")[1]
    assert pins("oldest") == [
        f"torch=={torch}.*",
        f"transformers=={transformers}.*",
        f"torchvision=={TORCHVISION[torch]}.*",
    ]


def test_the_newest_end_is_the_declared_range():
    assert pins("newest") == [declared("torch")[0], declared("transformers")[0]]
    assert all("<" in requirement for requirement in pins("newest"))
