"""The Triton form of ragged decode attention against plain fp64 attention, segment by segment."""

import pytest
import torch

from tests.ops.kernels import fresh, interpreted_errors, needs_triton, refusal

PAGE = 32
NAMES = {"kernel": "ragged_triton", "form": "decode", "cases": "test_ragged_triton"}

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


COMPILED = """
from retention.ops import ragged_triton
from tests.ops.kernels import build

aligned = [f"{x}_{y}" for x in ("query", "key", "value") for y in ("row", "head", "column")]
dense = ["query", "pages_k", "pages_v", "buffer_k", "buffer_v"]
sizes = {"group": 4, "value_width": 128, "value_block": 128}
more = {"widen": False, "kv_heads": 8, "page": 32, "width": 128, "width_block": 128, "group_block": 16, "block": 64}
types = {"page_starts": "*i32", "first": "*i64", "valid": "*u8", "outs": "*fp32", "lses": "*fp32", "scale": "fp32"}
types |= dict.fromkeys(dense, "*bf16") | {"result": "*bf16"}
for padded in (False, True):
    constants = {**sizes, **more, "has_valid": padded}
    built = build(ragged_triton, ragged_triton._partial, constants, types, aligned, num_stages=3, enable_fp_fusion=True)
    ptx = built.asm["ptx"]
    print("mma.sync" in ptx, any("cp.async.cg" in line and "0x10" in line for line in ptx.splitlines()))
constants = {**sizes, "block": 16}
built = build(ragged_triton, ragged_triton._merge, constants, types, aligned, num_stages=3, enable_fp_fusion=True)
print("st.global" in built.asm["ptx"])
"""


@pytest.fixture(scope="module")
def interpreted():
    return interpreted_errors(**NAMES)


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_triton_equals_the_reference(interpreted, case):
    assert interpreted[case] <= 20


@needs_triton
def test_triton_on_a_cpu_asks_for_its_interpreter():
    assert "expected CUDA tensors, got cpu" in refusal(**NAMES)


@needs_triton
def test_triton_compiles_for_hopper_with_tensor_cores_and_wide_asynchronous_loads(tmp_path):
    assert fresh(COMPILED, TRITON_CACHE_DIR=str(tmp_path)).split() == ["True"] * 5


def test_chunks_fill_the_device_and_are_whole_blocks():
    from retention.ops.ragged_triton import PROGRAMS_PER_PROCESSOR, _chunk

    assert _chunk(0, 64, 132) == _chunk(1, 64, 132) == 64
    for rows in (8_192, 300_000, 10_000_000):
        assert _chunk(rows, 64, 132) % 64 == 0
        assert -(-rows // _chunk(rows, 64, 132)) <= PROGRAMS_PER_PROCESSOR * 132
        assert rows // (_chunk(rows, 64, 132) - 64 or 1) >= PROGRAMS_PER_PROCESSOR * 132
