"""The gradient of `log_beta` made apart: against float64's autograd, in blocks, and as a Triton kernel interpreted on the CPU."""

import pytest
import torch

from retention.ops import age_gradient as module
from retention.ops.age_gradient import age_gradient, naive_age_gradient, with_age_gradient
from tests.ops.kernels import fresh, interpreted_errors, needs_triton, refusal
from tests.ops.test_split import truth

NAMES = {"kernel": "age_gradient_triton", "form": "age_gradient", "cases": "test_age_gradient"}
CASES = {
    "plain": {},
    "one token": {"tokens": 1},
    "several tiles": {"tokens": 150, "width": 64},
    "long": {"tokens": 300, "batch": 1, "kv_heads": 1},
    "heads of one": {"kv_heads": 4},
    "heads of four": {"kv_heads": 1},
    "widths apart": {"width": 24, "value_width": 40},
    "narrow": {"width": 5, "value_width": 3},
    "last queries": {"tokens": 150, "queries": 37},
    "last query": {"tokens": 70, "queries": 1},
    "padding": {"tokens": 90, "padded": True},
    "documents": {"tokens": 90, "packed": True},
    "documents and padding": {"tokens": 90, "packed": True, "padded": True},
    "strided": {"tokens": 40, "strided": True},
    "bfloat16": {"tokens": 90, "dtype": "bfloat16", "width": 32},
}


def draw(
    tokens=33, queries=None, batch=2, kv_heads=2, heads=4, width=16, value_width=None, padded=False, packed=False,
    strided=False, dtype="float32", device="cpu",
):  # fmt: skip
    """Arguments of `age_gradient`, and the gradient that float64's autograd finds."""
    g, kind, value_width = torch.Generator().manual_seed(tokens + width), getattr(torch, dtype), value_width or width
    queries = queries or tokens
    q = torch.randn(batch, heads, tokens, width, generator=g).to(kind)
    k, v = (torch.randn(batch, kv_heads, tokens, w, generator=g).to(kind) for w in (width, value_width))
    log_beta = (-torch.rand(batch, kv_heads, tokens, generator=g) / 10).double().requires_grad_()
    asked = torch.randn(batch, heads, tokens, value_width, generator=g).to(kind)
    asked[:, :, : tokens - queries] = 0
    valid = torch.rand(batch, tokens, generator=g) < 0.7 if padded else None
    if padded:
        asked = asked * valid[:, None, :, None]
    documents = (torch.rand(batch, tokens, generator=g) < 0.05).cumsum(1) if packed else None
    positions = torch.arange(tokens).expand(batch, -1) + 7
    where = {"scaling": 0.25, "positions": positions, "valid": valid, "documents": documents}
    out = truth(q.double(), k.double(), v.double(), log_beta, **where)
    (expected,) = torch.autograd.grad(out, log_beta, asked.double())
    logits = (0.25 * q.double() @ k.double().repeat_interleave(heads // kv_heads, 1).mT).detach()
    ages = (positions[:, None, :, None] - positions[:, None, None]).double()
    logits = logits + ages * log_beta.detach().repeat_interleave(heads // kv_heads, 1)[:, :, None]
    sees = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    sees = sees if valid is None else sees & valid[:, None, None]
    sees = sees if documents is None else sees & (documents[:, None, :, None] == documents[:, None, None])
    lse = logits.masked_fill(~(sees | torch.eye(tokens, dtype=torch.bool)), float("-inf")).logsumexp(-1)
    last = [x[:, :, tokens - queries :] for x in (lse.float(), out.detach().float().to(kind), asked)]
    if strided:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    given = (log_beta.detach().float(), q[:, :, tokens - queries :], k, v, *last)
    given = tuple(x.to(device) for x in given)
    where = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in where.items()}
    return given, where, expected


def error(form, case, device="cpu"):
    """Relative to the rounding of the dtype; NaN counts as infinite."""
    given, where, expected = draw(**CASES[case], device=device)
    found = form(*given, **where)
    assert found.dtype == torch.float32
    off = (found.double().cpu() - expected).norm() / expected.norm().clamp(min=0.1)
    return float(off.nan_to_num(float("inf"))) / torch.finfo(given[1].dtype).eps


@pytest.mark.parametrize("form", [naive_age_gradient, age_gradient])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_gradient_of_float64(monkeypatch, form, case):
    monkeypatch.setattr(module, "BLOCK", 32)
    assert error(form, case) <= 20


def test_an_output_that_gets_it_keeps_its_other_gradients():
    given, where, expected = draw()
    log_beta, q, k, v, lse, out, asked = given
    log_beta = log_beta.requires_grad_()
    source = out.clone().requires_grad_()
    result = with_age_gradient(2 * source, log_beta, (q, k, v), lse, where)
    assert torch.equal(result, 2 * source)
    plain, gate = torch.autograd.grad(
        with_age_gradient(source, log_beta, (q, k, v), lse, where), (source, log_beta), asked
    )
    assert torch.equal(plain, asked)
    torch.testing.assert_close(gate.double(), expected, rtol=1e-4, atol=1e-4)


def test_without_a_gate_that_learns_nothing_is_computed(monkeypatch):
    given, where, _ = draw()
    log_beta, q, k, v, lse, out, asked = given
    monkeypatch.setattr(module, "age_gradient", lambda *a, **k: pytest.fail("computed"))
    source = out.clone().requires_grad_()
    (plain,) = torch.autograd.grad(with_age_gradient(source, log_beta, (q, k, v), lse, where), source, asked)
    assert torch.equal(plain, asked)


COMPILED = """
from retention.ops import age_gradient_triton
from tests.ops.kernels import build

types = {"log_beta": "*fp32", "lse": "*fp32", "delta": "*fp32", "total": "*fp32", "scale": "fp32"}
types |= {"positions": "*i32", "valid": "*u8", "documents": "*i32"}
types |= {f"{x}_at": "*bf16" for x in ("q", "k", "v", "grad")}
aligned = [f"{x}_{y}" for x in ("q", "k", "v", "grad") for y in ("batch", "head", "row")]
sizes = {"kv_heads": 8, "group": 4, "width": 128, "value_width": 128, "width_block": 128, "value_block": 128, "tile": 64}
for more in (False, True):
    constants = {**sizes, "widen": False, "has_valid": more, "has_documents": more}
    kernel = age_gradient_triton._summed
    built = build(age_gradient_triton, kernel, constants, types, aligned, num_stages=2, num_warps=4)
    ptx = built.asm["ptx"]
    print("mma" in ptx, "st.global" in ptx, any("cp.async" in line for line in ptx.splitlines()))
    print(built.metadata.shared <= 160 * 1024)
"""


@pytest.fixture(scope="module")
def interpreted():
    return interpreted_errors(**NAMES)


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_computes_it(interpreted, case):
    assert interpreted[case] <= 20


@needs_triton
def test_the_kernel_on_a_cpu_asks_for_the_interpreter():
    assert "expected CUDA tensors, got cpu" in refusal(**NAMES)


@needs_triton
def test_the_kernel_compiles_for_hopper_with_tensor_cores_and_asynchronous_loads(tmp_path):
    assert fresh(COMPILED, TRITON_CACHE_DIR=str(tmp_path)).split() == ["True"] * 8
