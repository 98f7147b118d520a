"""Ragged decode attention as two Triton kernels: split-K partial attention, then a merge by log-sum-exp.

A program of the first kernel takes one segment (batch row, KV head) and one chunk of its page or buffer rows.
All chunks have one length, so long segments get many programs and short ones few. The truth is the plain-torch
form in `retention/ops/ragged.py`. Organisation: Flash-Decoding (Dao et al., 2023).

Triton is imported by the first call, which also compiles. `TRITON_INTERPRET=1`, set before, runs it on a CPU.
"""

from functools import cache
from math import e, log2
from types import SimpleNamespace
from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.ops.kernels import compiler, power

tl: Any = SimpleNamespace(constexpr="constexpr")
"""`triton.language` once `_kernels` ran: kernels find it among the globals of this module."""

PROGRAMS_PER_PROCESSOR = 6
"""Programs per streaming multiprocessor: three fit at a time, a second round evens out ragged ends."""

TILE_BYTES = 16384
"""Bytes of a tile of keys or of values; the stages of both take about 72 KiB of shared memory."""


def decode(
    query: Float[Tensor, "batch heads 1 head_dim"],
    pages_k: Float[Tensor, "pages page head_dim"],
    pages_v: Float[Tensor, "pages page value_dim"],
    page_starts: Int[Tensor, " starts"],
    buffer_k: Float[Tensor, "batch kv_heads capacity head_dim"],
    buffer_v: Float[Tensor, "batch kv_heads capacity value_dim"],
    filled: int,
    first: Int[Tensor, "batch kv_heads"],
    valid: Bool[Tensor, "batch columns"] | None,
    scaling: float,
    *,
    longest_pages: int,
) -> Float[Tensor, "batch heads 1 value_dim"]:
    """Softmax attention of one new token over the pages a head owns and its visible buffer columns together.

    Segment `row * kv_heads + head` owns the pages `page_starts[s]` to `page_starts[s + 1]`, all entries of which
    count. Of the buffer it sees columns `first` to `filled`, less those where `valid` is False; hidden entries
    are never read. `longest_pages` is the most pages that any segment owns, known on the host since the last
    eviction: pages beyond it are ignored. A head that sees nothing gives 0. Nothing waits for the device.
    Accumulates in fp32; weights are rounded to the dtype of the values before they meet them.

    Raises:
        ValueError: if the tensors are not on a CUDA device and Triton does not interpret, or if triton is missing.
    """
    segments, group = first.numel(), query.shape[1] // first.shape[1]
    width, value_width, page = pages_k.shape[2], pages_v.shape[2], pages_k.shape[1]
    block = max(16, min(128, TILE_BYTES // (power(max(width, value_width)) * pages_k.element_size())))
    rows = pages_k.shape[0] * page + segments * filled
    chunk = _chunk(rows, block, _processors(query.device))
    page_splits, buffer_splits = -(-longest_pages * page // chunk), -(-filled // chunk)
    splits = page_splits + buffer_splits
    result = query.new_zeros(*query.shape[:3], value_width)
    if splits == 0:
        return result
    partial, merge = _kernels(query.device.type)
    pages = [pages_k.contiguous(), pages_v.contiguous()]
    near = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, buffer_k, buffer_v)]
    first = first.contiguous()
    hidden = first if valid is None else valid.contiguous().view(torch.uint8)
    outs = torch.empty(segments, splits, group, value_width, dtype=torch.float32, device=query.device)
    lses = torch.empty(segments, splits, group, dtype=torch.float32, device=query.device)
    strides = [*near[0].stride()[:2], *near[1].stride()[:3], *near[2].stride()[:3], hidden.stride(0)]
    sizes = {"group": group, "value_width": value_width, "value_block": power(value_width)}
    more = {"widen": not query.is_cuda, "has_valid": valid is not None, "kv_heads": first.shape[1], "page": page}
    more |= {"width": width, "width_block": power(width), "group_block": power(group), "block": block}
    warps = 8 if pages_k.dtype == torch.float32 else 4  # four would spill registers with fp32 products
    tensors = (near[0], *pages, page_starts.contiguous(), *near[1:], first, hidden, outs, lses)
    numbers = (filled, chunk, page_splits, scaling * log2(e), *strides)
    options = {"enable_fp_fusion": True}  # what Triton has always done; later releases ask for the word
    with torch.cuda.device_of(query):  # Triton launches on the current device
        partial[(segments, splits)](*tensors, *numbers, **more, **sizes, num_warps=warps, num_stages=3, **options)
        merge[(segments, group)](outs, lses, result, splits, **sizes, block=16, num_warps=4, **options)
    return result


def _chunk(rows: int, block: int, processors: int) -> int:
    """Rows per program, whole blocks, such that about `PROGRAMS_PER_PROCESSOR` programs share each processor."""
    return max(1, -(-rows // (PROGRAMS_PER_PROCESSOR * processors * block))) * block


@cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; the interpreter gets few programs."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 4


@cache
def _kernels(device_type: str) -> tuple[Any, Any]:
    """The two kernels, compiled at their first launch."""
    global tl
    triton, tl = compiler(device_type)
    changing = ["filled", "chunk", "page_splits", "valid_row"]  # a new value must not compile anew
    return triton.jit(_partial, do_not_specialize=changing), triton.jit(_merge, do_not_specialize=["splits"])


@no_type_check
def _partial(
    query,
    pages_k,
    pages_v,
    page_starts,
    buffer_k,
    buffer_v,
    first,
    valid,
    outs,
    lses,
    filled,
    chunk,
    page_splits,
    scale,
    query_row,
    query_head,
    key_row,
    key_head,
    key_column,
    value_row,
    value_head,
    value_column,
    valid_row,
    widen: tl.constexpr,
    has_valid: tl.constexpr,
    kv_heads: tl.constexpr,
    page: tl.constexpr,
    width: tl.constexpr,
    width_block: tl.constexpr,
    group_block: tl.constexpr,
    block: tl.constexpr,
    group: tl.constexpr,
    value_width: tl.constexpr,
    value_block: tl.constexpr,
):
    """Attention of a query group over one chunk of its segment, normalised, and its log-sum-exp in base 2."""
    segment, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = segment // kv_heads, segment % kv_heads
    paged = split < page_splits
    # Both kinds of chunk are rows at a stride: pick base, stride and bounds once, then run one loop.
    start = tl.load(page_starts + segment).to(tl.int64) * page
    owned = (tl.load(page_starts + segment + 1).to(tl.int64) * page - start).to(tl.int32)
    k_base = tl.where(paged, pages_k + start * width, buffer_k + row * key_row + head * key_head)
    v_base = tl.where(paged, pages_v + start * value_width, buffer_v + row * value_row + head * value_head)
    k_stride, v_stride = tl.where(paged, width, key_column), tl.where(paged, value_width, value_column)
    low = tl.where(paged, split, split - page_splits) * chunk
    high = tl.minimum(low + chunk, tl.where(paged, owned, filled))
    masked = tl.where(paged, 0, high)  # `valid` speaks of the buffer alone
    low = tl.maximum(low, tl.where(paged, 0, tl.load(first + segment).to(tl.int32)))

    members, columns = tl.arange(0, group_block), tl.arange(0, width_block)
    value_columns, steps = tl.arange(0, value_block), tl.arange(0, block)
    q_at = query + row * query_row + (head * group + members[:, None]) * query_head + columns[None, :]
    q = tl.load(q_at, mask=(members < group)[:, None] & (columns < width)[None, :], other=0.0)
    q = q.to(pages_k.dtype.element_ty)
    top = tl.full([group_block], float("-inf"), tl.float32)
    mass = tl.zeros([group_block], tl.float32)
    total = tl.zeros([group_block, value_block], tl.float32)
    for at in range(low, high, block):
        here = at + steps
        see = here < high
        if has_valid:
            see = see & (tl.load(valid + row * valid_row + here, mask=here < masked, other=1) != 0)
        far = here.to(tl.int64)[:, None]
        k = tl.load(
            k_base + far * k_stride + columns[None, :], mask=see[:, None] & (columns < width)[None, :], other=0.0
        )
        v_mask = see[:, None] & (value_columns < value_width)[None, :]
        v = tl.load(v_base + far * v_stride + value_columns[None, :], mask=v_mask, other=0.0)
        if widen:
            q, k = q.to(tl.float32), k.to(tl.float32)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logits = tl.where(see[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far: keep exp2 away from inf - inf
        weights, fade = tl.exp2(logits - shift[:, None]), tl.exp2(top - shift)
        mass = mass * fade + tl.sum(weights, 1)
        weights = weights.to(v.dtype)
        if widen:
            weights, v = weights.to(tl.float32), v.to(tl.float32)
        total = tl.dot(weights, v, total * fade[:, None], input_precision="ieee")
        top = higher

    place = (segment * tl.num_programs(1) + split) * group + members
    divisor = tl.where(mass > 0, mass, 1.0)
    tl.store(lses + place, tl.where(mass > 0, top + tl.log2(divisor), float("-inf")), mask=members < group)
    seen = ((members < group) & (mass > 0))[:, None] & (value_columns < value_width)[None, :]
    tl.store(outs + place[:, None] * value_width + value_columns[None, :], total / divisor[:, None], mask=seen)


@no_type_check
def _merge(
    outs,
    lses,
    result,
    splits,
    group: tl.constexpr,
    value_width: tl.constexpr,
    value_block: tl.constexpr,
    block: tl.constexpr,
):
    """The parts of one query head weighed by their log-sum-exp; a part of -inf was never written and is not read."""
    segment, member = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns, steps = tl.arange(0, value_block), tl.arange(0, block)
    top = tl.full([1], float("-inf"), tl.float32)
    mass = tl.zeros([1], tl.float32)
    total = tl.zeros([value_block], tl.float32)
    for at in range(0, splits, block):
        place = (segment * splits + at + steps) * group + member
        lse = tl.load(lses + place, mask=at + steps < splits, other=float("-inf"))
        higher = tl.maximum(top, tl.max(lse, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights, fade = tl.exp2(lse - shift), tl.exp2(top - shift)
        mask = (weights > 0)[:, None] & (columns < value_width)[None, :]
        parts = tl.load(outs + place[:, None] * value_width + columns[None, :], mask=mask, other=0.0)
        mass = mass * fade + tl.sum(weights, 0)
        total = total * fade + tl.sum(weights[:, None] * parts, 0)
        top = higher
    total = total / tl.where(mass > 0, mass, 1.0)  # nothing seen: 0 / 1
    at = result + (segment * group + member) * value_width + columns
    tl.store(at, total.to(result.dtype.element_ty), mask=columns < value_width)
