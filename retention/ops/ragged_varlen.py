"""Ragged decode attention through `torch.nn.attention.varlen`: pages in one fused call, the buffer in torch ops.

A segment (batch row, KV head) is a sequence of its own with one KV head, its query group are the query tokens.
The truth is the plain-torch form in `retention/ops/ragged.py`. CUDA and half precision only.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
    attend: Callable[..., Any] | None = None,
) -> Float[Tensor, "batch heads 1 head_dim"]:
    """What `retention.ops.ragged_triton.decode` computes, from the same arguments; `attend` stands in for `varlen_attn`.

    Keys and values have one width. The pages' part is rounded to the dtype of the query before the merge in fp32.

    Raises:
        ValueError: if the dtype is not bfloat16 or float16, or if keys and values differ in width.
    """
    if pages_v.shape[-1] != pages_k.shape[-1]:
        widths = pages_k.shape[-1], pages_v.shape[-1]
        raise ValueError(f"expected keys and values of one width for varlen attention, got {widths}; take another form")
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"expected bfloat16 or float16 for varlen attention, got {query.dtype}; take another form")
    segments, group = first.numel(), query.shape[1] // first.shape[1]
    grouped = query.reshape(segments, group, -1)
    out, lse = _buffer(grouped, buffer_k[:, :, :filled], buffer_v[:, :, :filled], first, valid, scaling)
    if pages_k.shape[0]:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        queries = torch.arange(segments + 1, dtype=torch.int32, device=query.device) * group
        tokens = grouped.reshape(segments * group, 1, -1)
        keys, values = (x.flatten(0, 1)[:, None] for x in (pages_k, pages_v))
        ends, longest = (page_starts * pages_k.shape[1]).int(), longest_pages * pages_k.shape[1]
        sizes = (queries, ends, group, longest)
        found = (attend or varlen_attn)(tokens, keys, values, *sizes, scale=scaling, return_aux=AuxRequest(lse=True))
        paged, paged_lse = found[0].reshape(grouped.shape).float(), found[1].reshape(segments, group).float()
        none = (page_starts.diff() == 0)[:, None]  # kernels differ in what they leave for an empty sequence
        paged, paged_lse = paged.masked_fill(none[..., None], 0.0), paged_lse.masked_fill(none, float("-inf"))
        both = torch.logaddexp(lse, paged_lse).masked_fill(none & lse.isneginf(), 0.0)
        out = (lse - both).exp()[..., None] * out + (paged_lse - both).exp()[..., None] * paged
    return out.to(query.dtype).view(query.shape)


def _buffer(
    grouped: Float[Tensor, "segments group head_dim"],
    k: Float[Tensor, "batch kv_heads columns head_dim"],
    v: Float[Tensor, "batch kv_heads columns head_dim"],
    first: Int[Tensor, "batch kv_heads"],
    valid: Bool[Tensor, "batch columns"] | None,
    scaling: float,
) -> tuple[Float[Tensor, "segments group head_dim"], Float[Tensor, "segments group"]]:
    """Attention over the visible columns and its log-sum-exp; 0 and -inf where none is."""
    visible = torch.arange(k.shape[2], device=k.device) >= first[..., None]
    visible = (visible if valid is None else visible & valid[:, None]).flatten(0, 1)[:, None]
    logits = torch.bmm(grouped.float(), k.flatten(0, 1).float().transpose(1, 2)) * scaling
    lse = logits.masked_fill_(~visible, float("-inf")).logsumexp(-1)
    weights = (logits - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    return torch.bmm(weights, v.flatten(0, 1).float().masked_fill(~visible.mT, 0.0)), lse
