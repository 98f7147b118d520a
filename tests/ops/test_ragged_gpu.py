"""The Triton form of ragged decode attention on a CUDA device; not run by default (`make test-gpu`)."""

import pytest
import torch

from tests.ops.test_ragged_triton import CASES, PAGE, error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_triton_on_cuda_equals_the_reference(monkeypatch, case, dtype):
    from retention.ops.ragged_triton import decode

    pytest.importorskip("triton")
    monkeypatch.setitem(CASES, case, {**CASES[case], "dtype": dtype})
    assert error(decode, case, device="cuda") <= (40 if dtype == "float32" else 4)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_triton_on_cuda_at_the_sizes_of_models(monkeypatch, width, dtype):
    from retention.ops.ragged_triton import decode

    pytest.importorskip("triton")
    pages = [100, 3, 0, 41, 260, 7, 1, 16]
    given = {"pages": pages, "width": width, "group": 4, "filled": 200, "first": "some", "dtype": dtype}
    monkeypatch.setitem(CASES, "model", given)
    assert error(decode, "model", device="cuda") <= (100 if dtype == "float32" else 4)


def test_new_lengths_compile_nothing_and_wait_for_nothing(monkeypatch):
    from retention.ops import ragged_triton
    from tests.ops.test_ragged_triton import draw

    pytest.importorskip("triton")
    given = list(draw([40, 2, 0, 7], width=64, filled=33, spare=67, dtype="bfloat16", device="cuda"))
    ragged_triton.decode(*given, longest_pages=40)
    kernels = ragged_triton._kernels("cuda")
    compiled = [sum(len(x[0]) for x in kernel.device_caches.values()) for kernel in kernels]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for filled in (1, 16, PAGE, 100):
            given[6] = filled
            ragged_triton.decode(*given, longest_pages=40)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compiled == [sum(len(x[0]) for x in kernel.device_caches.values()) for kernel in kernels]
