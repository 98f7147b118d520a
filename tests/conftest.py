"""Shared fixtures. Nothing here imports `retention` at module level: the type checker must be installed first."""

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))  # OMP_NUM_THREADS=1 stays 1


@pytest.fixture(scope="session")
def embedded_model():
    from retention.embedded import load_model

    return load_model().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def embedded_processor():
    from retention.embedded import load_processor

    return load_processor()
