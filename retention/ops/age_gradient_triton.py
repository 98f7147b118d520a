"""The gradient of `log_beta` as one Triton kernel: the weights of a tile of pairs made anew, times ages, summed.

A program takes a tile of keys and runs over the queries that see it, of all heads of the group; nothing as large as
tokens x tokens is stored. The truth is `naive_age_gradient`. Organisation: the backward of FlashAttention-2 (Dao, 2023).

Triton is imported by the first call, which also compiles. `TRITON_INTERPRET=1`, set before, runs it on a CPU.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.ops.kernels import compiler, power

tl: Any = SimpleNamespace(constexpr="constexpr")
"""`triton.language` once `_kernel` ran: the kernel finds it among the globals of this module."""

TILE_BYTES = 16384
"""Bytes of a tile of queries, keys, values or gradients; all six of a program take about 96 KiB of shared memory."""


def age_gradient(
    log_beta: Float[Tensor, "batch kv_heads tokens"],
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    lse: Float[Tensor, "batch heads queries"],
    out: Float[Tensor, "batch heads queries value_dim"],
    grad: Float[Tensor, "batch heads queries value_dim"],
    *,
    scaling: float,
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
    documents: Int[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch kv_heads tokens"]:
    """What `retention.ops.age_gradient.naive_age_gradient` computes, from the same arguments.

    Raises:
        ValueError: if the tensors are not on a CUDA device and Triton does not interpret, or if triton is missing.
    """
    kernel = _kernel(q.device.type)
    batch, kv_heads, tokens, width = k.shape
    queries, value_width = q.shape[2], v.shape[3]
    delta = torch.einsum("bhtd,bhtd->bht", grad.float(), out.float()).contiguous()
    near = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, grad.to(v.dtype))]
    none = positions.int().contiguous()
    keep = none if valid is None else valid.contiguous().view(torch.uint8)
    own = none if documents is None else documents.int().contiguous()
    total = torch.empty(batch, kv_heads, tokens, dtype=torch.float32, device=q.device)
    widest = max(power(width), power(value_width))
    tile = max(16, min(64, TILE_BYTES // (widest * k.element_size())))
    sizes = {"kv_heads": kv_heads, "group": q.shape[1] // kv_heads, "width": width, "value_width": value_width}
    more = {"width_block": power(width), "value_block": power(value_width), "tile": tile, "widen": not q.is_cuda}
    more |= {"has_valid": valid is not None, "has_documents": documents is not None}
    facts = (log_beta.float().contiguous(), lse.float().contiguous(), delta, none, keep, own, total)
    strides = [stride for x in near for stride in x.stride()[:3]]
    with torch.cuda.device_of(q):  # Triton launches on the current device
        grid = (-(-tokens // tile), batch * kv_heads)
        kernel[grid](
            *near, *facts, queries, tokens, float(scaling), *strides, **sizes, **more, num_warps=4, num_stages=2
        )
    return total


@cache
def _kernel(device_type: str) -> Any:
    """The kernel, compiled at its first launch."""
    global tl
    triton, tl = compiler(device_type)
    return triton.jit(_summed, do_not_specialize=["queries", "tokens"])  # a new length must not compile anew


@no_type_check
def _summed(
    q_at,
    k_at,
    v_at,
    grad_at,
    log_beta,
    lse,
    delta,
    positions,
    valid,
    documents,
    total,
    queries,
    tokens,
    scale,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    grad_batch,
    grad_head,
    grad_row,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    value_width: tl.constexpr,
    width_block: tl.constexpr,
    value_block: tl.constexpr,
    tile: tl.constexpr,
    widen: tl.constexpr,
    has_valid: tl.constexpr,
    has_documents: tl.constexpr,
):
    """One tile of keys: the sum over later queries of their ages times weights times what the loss asks of them."""
    segment = tl.program_id(1).to(tl.int64)
    batch, kv_head = segment // kv_heads, segment % kv_heads
    steps, columns, value_columns = tl.arange(0, tile), tl.arange(0, width_block), tl.arange(0, value_block)
    first = tokens - queries
    keys = tl.program_id(0) * tile + steps
    there = keys < tokens
    far = keys.to(tl.int64)[:, None]
    k_from = k_at + batch * k_batch + kv_head * k_head + far * k_row + columns[None, :]
    k = tl.load(k_from, mask=there[:, None] & (columns < width)[None, :], other=0.0)
    v_from = v_at + batch * v_batch + kv_head * v_head + far * v_row + value_columns[None, :]
    v = tl.load(v_from, mask=there[:, None] & (value_columns < value_width)[None, :], other=0.0)
    slope = tl.load(log_beta + segment * tokens + keys, mask=there, other=0.0)
    key_position = tl.load(positions + batch * tokens + keys, mask=there, other=0)
    if has_valid:
        there = there & (tl.load(valid + batch * tokens + keys, mask=there, other=0) != 0)
    if has_documents:
        key_document = tl.load(documents + batch * tokens + keys, mask=there, other=-1)
    if widen:
        k, v = k.to(tl.float32), v.to(tl.float32)
    found = tl.zeros([tile], tl.float32)
    begin = tl.maximum(tl.program_id(0) * tile - first, 0)
    for member in range(0, group):
        head = kv_head * group + member
        line = (batch * kv_heads * group + head) * queries
        for at in range(begin, queries, tile):
            rows = at + steps
            inside = rows < queries
            row = rows.to(tl.int64)[:, None]
            q_from = q_at + batch * q_batch + head * q_head + row * q_row + columns[None, :]
            q = tl.load(q_from, mask=inside[:, None] & (columns < width)[None, :], other=0.0)
            g_from = grad_at + batch * grad_batch + head * grad_head + row * grad_row + value_columns[None, :]
            g = tl.load(g_from, mask=inside[:, None] & (value_columns < value_width)[None, :], other=0.0)
            if widen:
                q, g = q.to(tl.float32), g.to(tl.float32)
            mass = tl.load(lse + line + rows, mask=inside, other=0.0)
            mean = tl.load(delta + line + rows, mask=inside, other=0.0)
            position = tl.load(positions + batch * tokens + first + rows, mask=inside, other=0)
            ages = (position[:, None] - key_position[None, :]).to(tl.float32)
            see = (inside[:, None] & there[None, :]) & ((first + rows)[:, None] >= keys[None, :])
            if has_documents:
                document = tl.load(documents + batch * tokens + first + rows, mask=inside, other=-2)
                see = see & (document[:, None] == key_document[None, :])
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + ages * slope[None, :]
            weights = tl.exp(tl.where(see, logits - mass[:, None], float("-inf")))
            asked = tl.dot(g, tl.trans(v), input_precision="ieee") - mean[:, None]
            found += tl.sum(weights * asked * ages, 0)
    tl.store(total + segment * tokens + keys, found, mask=keys < tokens)
