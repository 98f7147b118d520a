"""The Triton and the varlen form of ragged decode attention against plain fp64 attention, segment by segment."""

import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = 32
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (Linux only)")

LONG, MIXED = [9, 0, 1, 4, 0, 2], [3, 1, 0, 0, 5, 2]
CASES = {
    "plain": {"pages": MIXED},
    "one segment": {"pages": [7], "batch": 1, "filled": 3},
    "several splits": {"pages": LONG, "width": 64},
    "long buffer": {"pages": LONG, "filled": 300, "first": "some"},
    "all empty": {"pages": [0] * 6, "filled": 0},
    "no capacity": {"pages": MIXED, "filled": 0, "spare": 0},
    "buffer alone": {"pages": [0] * 6, "filled": 40, "first": "some"},
    "holes": {"pages": MIXED, "filled": 20, "first": "some"},
    "all holes": {"pages": MIXED, "filled": 20, "first": "all"},
    "padding": {"pages": MIXED, "filled": 20, "valid": True},
    "padding and holes": {"pages": MIXED, "filled": 150, "valid": True, "first": "some"},
    "heads of one": {"pages": MIXED, "group": 1},
    "heads of four": {"pages": MIXED, "group": 4, "first": "some"},
    "heads of eight": {"pages": MIXED, "group": 8, "valid": True},
    "heads of twenty": {"pages": MIXED, "group": 20},
    "other value width": {"pages": MIXED, "width": 24, "value_width": 40, "first": "some"},
    "wide": {"pages": MIXED, "width": 128},
    "strided": {"pages": MIXED, "strided": True, "valid": True, "first": "some"},
    "bfloat16": {"pages": LONG, "width": 64, "dtype": "bfloat16", "filled": 40, "first": "some"},
    "bfloat16 padded": {"pages": MIXED, "dtype": "bfloat16", "filled": 40, "valid": True, "group": 8},
    "float16": {"pages": MIXED, "dtype": "float16", "filled": 9},
}


def draw(
    pages, batch=None, group=2, width=16, value_width=None, filled=11, spare=5, first=None, valid=False,
    strided=False, dtype="float32", device="cpu",
):  # fmt: skip
    """Arguments of `decode`; whatever must not be read is NaN."""
    g, kind = torch.Generator().manual_seed(sum(pages) + filled + group + width), getattr(torch, dtype)
    batch, value_width = batch or 2, value_width or width
    kv_heads, capacity = len(pages) // batch, filled + spare
    starts = torch.tensor([0, *pages]).cumsum(0)
    query = torch.randn(batch, 1, kv_heads * group, width, generator=g).transpose(1, 2)
    stored = [torch.randn(sum(pages), PAGE, w, generator=g) for w in (width, value_width)]
    near = [torch.randn(batch, kv_heads, capacity, w, generator=g) for w in (width, value_width)]
    holes = torch.zeros(batch, kv_heads, dtype=torch.int64)
    if first is not None:
        holes = torch.full_like(holes, filled)
    if first == "some":
        holes = torch.randint(0, filled + 1, holes.shape, generator=g)
    seen = torch.rand(batch, filled, generator=g) < 0.6 if valid else None
    if seen is not None:
        seen[0] = False
    columns = torch.arange(capacity)
    hidden = (columns >= filled) | (columns < holes[..., None])
    if seen is not None:
        hidden[..., :filled] |= ~seen[:, None]
    near = [x.masked_fill(hidden[..., None], float("nan")) for x in near]
    if strided:
        near = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in near]
    query, stored, near = (
        query.to(device, kind),
        [x.to(device, kind) for x in stored],
        [x.to(device, kind) for x in near],
    )
    given = (query, *stored, starts.int().to(device), *near, filled, holes.to(device))
    return (*given, seen if seen is None else seen.to(device), 0.37)


def reference(query, pages_k, pages_v, page_starts, buffer_k, buffer_v, filled, first, valid, scaling):
    """fp64, one query head at a time."""
    batch, kv_heads = first.shape
    group = query.shape[1] // kv_heads
    out = torch.zeros(*query.shape[:3], pages_v.shape[-1], dtype=torch.float64)
    for row, head in ((b, h) for b in range(batch) for h in range(kv_heads)):
        own = slice(*page_starts[row * kv_heads + head :][:2].tolist())
        see = torch.arange(filled, device=first.device) >= first[row, head]
        see = see if valid is None else see & valid[row]
        parts = ((pages_k, buffer_k), (pages_v, buffer_v))
        k, v = (torch.cat([p[own].flatten(0, 1), b[row, head, :filled][see]]).double().cpu() for p, b in parts)
        if len(k):
            for i in range(head * group, (head + 1) * group):
                out[row, i, 0] = (scaling * k @ query[row, i, 0].double().cpu()).softmax(0) @ v
    return out


def error(form, case, device="cpu", **more):
    """The largest error of a form, relative to the rounding of the dtype; NaN counts as infinite."""
    given = draw(**CASES[case], device=device)
    out = form(*given, longest_pages=max(CASES[case]["pages"]), **more)
    assert out.dtype == given[0].dtype
    assert out.shape == (*given[0].shape[:3], given[2].shape[-1])
    found = (out.double().cpu() - reference(*given)).abs().nan_to_num(float("inf")).max()
    return float(found) / torch.finfo(out.dtype).eps


def twin(turned, empty):
    """A torch stand-in for `varlen_attn` in one of the two layouts of its log-sum-exp."""
    from torch.nn.attention.varlen import varlen_attn

    def attend(*args, **kwargs):
        given = inspect.signature(varlen_attn).bind(*args, **kwargs).arguments
        q, k, v = (given[name] for name in ("query", "key", "value"))
        starts, ends = given["cu_seq_q"].tolist(), given["cu_seq_k"].tolist()
        assert given["cu_seq_q"].dtype == given["cu_seq_k"].dtype == torch.int32
        assert given["return_aux"].lse
        assert given["max_q"] == max(b - a for a, b in pairwise(starts))
        assert given["max_k"] == max(b - a for a, b in pairwise(ends))
        out, lse = torch.zeros_like(q), torch.full(q.shape[:2], empty)
        for (a, b), (c, d) in zip(pairwise(starts), pairwise(ends), strict=True):
            logits = given["scale"] * torch.einsum("qhd,khd->qhk", q[a:b].float(), k[c:d].float())
            if c < d:
                out[a:b] = torch.einsum("qhk,khd->qhd", logits.softmax(-1), v[c:d].float()).to(q.dtype)
                lse[a:b] = logits.logsumexp(-1)
        return out, lse.T.contiguous() if turned else lse

    return attend


def fresh(code, **given):
    """What a new interpreter prints, as Triton decides at its import whether it interprets."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", **given}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=given)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


INTERPRETED = """
import json
from retention.ops.ragged_triton import decode
from tests.ops.test_ragged_triton import CASES, error
print(json.dumps({case: error(decode, case) for case in CASES}))
"""

REFUSED = """
from retention.ops.ragged_triton import decode
from tests.ops.test_ragged_triton import error
try:
    error(decode, "plain")
except ValueError as problem:
    print(problem)
"""

COMPILED = """
import inspect
import triton, triton.language
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from retention.ops import ragged_triton

ragged_triton.tl = triton.language

def build(function, constants, types):
    kernel, names = triton.jit(function), list(inspect.signature(function).parameters)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    wide = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in ALIGNED]
    given = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, given, {(i,): [["tt.divisibility", 16]] for i in wide})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_stages": 3, "enable_fp_fusion": True})

ALIGNED = [f"{x}_{y}" for x in ("query", "key", "value") for y in ("row", "head", "column")]
DENSE = ["query", "pages_k", "pages_v", "buffer_k", "buffer_v"]
sizes = {"group": 4, "value_width": 128, "value_block": 128}
more = {"widen": False, "kv_heads": 8, "page": 32, "width": 128, "width_block": 128, "group_block": 16, "block": 64}
types = {"page_starts": "*i32", "first": "*i64", "valid": "*u8", "outs": "*fp32", "lses": "*fp32", "scale": "fp32"}
types |= dict.fromkeys(DENSE, "*bf16") | {"result": "*bf16"}
for padded in (False, True):
    ptx = build(ragged_triton._partial, {**sizes, **more, "has_valid": padded}, types).asm["ptx"]
    print("mma.sync" in ptx, any("cp.async.cg" in line and "0x10" in line for line in ptx.splitlines()))
print("st.global" in build(ragged_triton._merge, {**sizes, "block": 16}, types).asm["ptx"])
"""


@pytest.fixture(scope="module")
def interpreted():
    """Errors of all cases under Triton's interpreter."""
    if tuple(int(part) for part in version("triton").split(".")[:2]) < (3, 7):
        pytest.skip("the interpreter of Triton before 3.7 fails with NumPy 2.4")
    return json.loads(fresh(INTERPRETED, TRITON_INTERPRET="1"))


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_triton_equals_the_reference(interpreted, case):
    assert interpreted[case] <= 20


@needs_triton
def test_triton_on_a_cpu_asks_for_its_interpreter():
    assert "expected CUDA tensors, got cpu" in fresh(REFUSED)


@needs_triton
def test_triton_compiles_for_hopper_with_tensor_cores_and_wide_asynchronous_loads(tmp_path):
    """No GPU is needed: the compiler and ptxas come with Triton, and are stricter than its interpreter."""
    assert fresh(COMPILED, TRITON_CACHE_DIR=str(tmp_path)).split() == ["True"] * 5


def test_chunks_fill_the_device_and_are_whole_blocks():
    from retention.ops.ragged_triton import PROGRAMS_PER_PROCESSOR, _chunk

    assert _chunk(0, 64, 132) == _chunk(1, 64, 132) == 64
    for rows in (8_192, 300_000, 10_000_000):
        assert _chunk(rows, 64, 132) % 64 == 0
        assert -(-rows // _chunk(rows, 64, 132)) <= PROGRAMS_PER_PROCESSOR * 132
        assert rows // (_chunk(rows, 64, 132) - 64 or 1) >= PROGRAMS_PER_PROCESSOR * 132


HALF = [case for case, given in CASES.items() if given.get("width") == given.get("value_width", given.get("width"))]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", HALF)
def test_varlen_equals_the_reference(monkeypatch, case, turned):
    from retention.ops.ragged_varlen import decode

    monkeypatch.setitem(CASES, case, {**CASES[case], "dtype": CASES[case].get("dtype", "bfloat16")})
    assert error(decode, case, attend=twin(turned, empty=float("inf") if turned else float("-inf"))) <= 4


def test_varlen_refuses_what_its_kernel_cannot_do():
    from retention.ops.ragged_varlen import decode

    with pytest.raises(ValueError, match="bfloat16 or float16"):
        error(decode, "plain")
    with pytest.raises(ValueError, match="one width"):
        error(decode, "other value width")


def test_varlen_calls_the_signature_of_this_torch(monkeypatch):
    from torch.nn.attention import varlen

    from retention.ops.ragged_varlen import decode

    monkeypatch.setattr(varlen, "varlen_attn", twin(turned=True, empty=float("inf")))
    monkeypatch.setitem(CASES, "plain", {**CASES["plain"], "dtype": "bfloat16"})
    assert error(decode, "plain") <= 4
