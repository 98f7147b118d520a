"""Shared fixtures. Nothing here imports `retention` at module level: the type checker must be installed first."""

import pytest
import torch

torch.set_num_threads(1)  # tensors here are tiny: a second thread only waits for the first


@pytest.fixture(scope="session")
def embedded_model():
    from retention.embedded import load_model

    return load_model().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def embedded_processor():
    from retention.embedded import load_processor

    return load_processor()
