"""The split form is tried on a device before it is taken; what fails or errs there is not."""

import logging
import re

import pytest
import torch

from retention.ops import proof, split

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh():
    proof.proven.cache_clear()
    yield
    proof.proven.cache_clear()


@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (80, 40)])
def test_it_is_right_here(widths):
    assert proof.proven(CPU, *widths)


def upper_left(q, k, v, scaling):
    """Causal from the first key on, as fused attention has it where there are fewer queries."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1)[:, :, : q.shape[2]] for x in (k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scaling)


def broken(q, k, v, scaling):
    raise RuntimeError("no kernel image is available\nand more")


@pytest.mark.parametrize(("kernel", "told"), [(upper_left, "errs by"), (broken, r"fails on cpu \(no kernel image is available\)")])  # fmt: skip
def test_a_kernel_that_errs_or_fails_is_not_taken(kernel, told, monkeypatch, caplog):
    monkeypatch.setattr(split, "fused_causal", kernel)
    with caplog.at_level(logging.WARNING):
        assert not proof.proven(CPU, 64, 64)
        assert not proof.proven(CPU, 64, 64)
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().count("fp32 instead") == 1
    assert re.search(told, caplog.text)


def test_nothing_random_is_used_up():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    proof.proven(CPU, 64, 64)
    assert torch.equal(torch.get_rng_state(), before)
