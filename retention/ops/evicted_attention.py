"""Attention with evicted keys: by decisions that take effect from a later query on, or all of them a fixed time later.

Training self-attention only (queries are the keys), causal unless told otherwise, left or right padding.
Source: arXiv 2506.05345 (delayed).
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.ops.blocks import in_blocks, seen
from retention.ops.decay import age
from retention.ops.logits import capped


def naive_evicted_attention(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    log_keep: Float[Tensor, "batch kv_heads tokens"],
    since: Int[Tensor, "batch kv_heads tokens"],
    *,
    scaling: float,
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
    allowed: Bool[Tensor, "batch 1 tokens tokens"] | None = None,
    first: int = 0,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention with `log_keep` of a key added to its logits for queries from position `since` of the key on.

    `allowed` and `first` as for gated attention. Rows of padded queries are undefined.
    """
    groups, rows = q.shape[1] // k.shape[1], slice(first, first + q.shape[2])
    ahead = age(positions[:, None, rows].expand(-1, k.shape[1], -1), since) >= 0
    bias = torch.where(ahead, log_keep[:, :, None], 0.0).repeat_interleave(groups, 1)
    k, v = (x.repeat_interleave(groups, 1).float() for x in (k, v))
    logits = capped(scaling * q.float() @ k.transpose(-1, -2), scaling) + bias
    weights = logits.masked_fill(~seen(k.shape[2], rows, valid, allowed, q.device), float("-inf")).softmax(-1)
    return (weights @ v).to(q.dtype)


def evicted_attention(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    log_keep: Float[Tensor, "batch kv_heads tokens"],
    since: Int[Tensor, "batch kv_heads tokens"],
    *,
    scaling: float,
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
    allowed: Bool[Tensor, "batch 1 tokens tokens"] | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """The same in blocks of queries, computed again in the backward: no tokens x tokens map is kept."""

    def block(rows: Tensor, first: int) -> Tensor:
        more: dict[str, Any] = {"positions": positions, "valid": valid, "allowed": allowed, "first": first}
        return naive_evicted_attention(rows, k, v, log_keep, since, scaling=scaling, **more)

    return in_blocks(block, q)


def naive_delayed_attention(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    log_keep: Float[Tensor, "batch kv_heads tokens"],
    *,
    window: int,
    positions: Int[Tensor, "batch tokens"],
    **how: Any,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Evicted attention where every decision takes effect for queries more than `window` tokens behind the key."""
    return naive_evicted_attention(q, k, v, log_keep, _behind(window, positions, log_keep), positions=positions, **how)


def delayed_attention(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    log_keep: Float[Tensor, "batch kv_heads tokens"],
    *,
    window: int,
    positions: Int[Tensor, "batch tokens"],
    **how: Any,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """The same in blocks of queries."""
    return evicted_attention(q, k, v, log_keep, _behind(window, positions, log_keep), positions=positions, **how)


def _behind(window: int, positions: Tensor, like: Tensor) -> Int[Tensor, "batch kv_heads tokens"]:
    """The first position more than `window` tokens behind each key."""
    return (positions + window + 1)[:, None].expand_as(like)
