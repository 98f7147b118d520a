"""Gated attention, a naive truth and a fast twin each: by decay (`scale q.k + age * log_beta`), or evicted.

Evicted: by decisions that take effect from a later query on; delayed, by all of them a fixed time later.

Training self-attention only (queries are the keys), causal unless told otherwise, one document per row, left or right
padding.
Sources: arXiv 2512.03324, eq. 3 (additive form); arXiv 2506.05345 (delayed).
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from retention.ops.decay import age
from retention.ops.logits import capped, softcap_of

BLOCK = 256
PAD_LOGIT = -1e4
"""Added to padded keys by the fused form; large against any logit, small enough for exact fp32 sums."""


def naive_gated_attention(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    log_beta: Float[Tensor, "batch kv_heads tokens"],
    *,
    scaling: float,
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
    allowed: Bool[Tensor, "batch 1 tokens tokens"] | None = None,
    first: int = 0,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Gated attention with the whole bias written out; rows of padded queries are undefined.

    `allowed`: what each token sees, instead of its past; keys ahead do not decay. `first`: the token that the first
    query is. A cap that belongs to the scaling is applied before the bias.
    """
    groups, rows = q.shape[1] // k.shape[1], slice(first, first + q.shape[2])
    k, v, log_beta = (x.repeat_interleave(groups, 1).float() for x in (k, v, log_beta))
    ages = age(positions[:, rows], positions).clamp(min=0)[:, None]
    bias = (ages * log_beta[:, :, None]).masked_fill(~_seen(k.shape[2], rows, valid, allowed, q.device), float("-inf"))
    weights = (capped(scaling * q.float() @ k.transpose(-1, -2), scaling) + bias).softmax(-1)
    return (weights @ v).to(q.dtype)


def _seen(
    tokens: int,
    rows: slice,
    valid: Bool[Tensor, "batch tokens"] | None,
    allowed: Bool[Tensor, "batch 1 tokens tokens"] | None,
    device: torch.device,
) -> Bool[Tensor, "..."]:
    """Which keys some queries see: their past, padding excluded, or what is allowed; always themselves."""
    columns = torch.arange(tokens, device=device)
    own = columns == columns[rows, None]
    if allowed is not None:
        return allowed[:, :, rows] | own
    causal = columns <= columns[rows, None]
    return (causal if valid is None else causal & valid[:, None, None]) | own


def blocked_gated_attention(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    log_beta: Float[Tensor, "batch kv_heads tokens"],
    *,
    scaling: float,
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
    allowed: Bool[Tensor, "batch 1 tokens tokens"] | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """The same in blocks of queries, computed again in the backward: for masks that are not causal and capped logits.

    Without a cap each block is one SDPA call with the bias as its mask.
    """
    groups = q.shape[1] // k.shape[1]

    def block(rows: Tensor, first: int) -> Tensor:
        if softcap_of(scaling) is not None:
            more: dict[str, Any] = {"positions": positions, "valid": valid, "allowed": allowed, "first": first}
            return naive_gated_attention(rows, k, v, log_beta, scaling=scaling, **more)
        own = slice(first, first + rows.shape[2])
        ages = age(positions[:, own], positions).clamp(min=0)[:, None]
        bias = ages * log_beta.float()[:, :, None]
        bias = bias.masked_fill(~_seen(k.shape[2], own, valid, allowed, q.device), float("-inf")).to(q.dtype)
        wide = (x.repeat_interleave(groups, 1) for x in (k, v, bias))
        keys, values, mask = wide
        return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scaling)

    return _in_blocks(block, q)


def _in_blocks(block: Callable[[Tensor, int], Tensor], q: Tensor) -> Tensor:
    """A function of some queries and the first one's number, over all of them; nothing of a block is kept."""
    starts = range(0, q.shape[2], BLOCK)
    return torch.cat([checkpoint(block, q[:, :, at : at + BLOCK], at, use_reentrant=False) for at in starts], 2)


def augmented_gated_attention(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens head_dim"],
    log_beta: Float[Tensor, "batch kv_heads tokens"],
    *,
    scaling: float,
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """The same through one fused causal SDPA call, without a tokens x tokens bias, in fp32.

    `(t - i) * log_beta_i = [t, 1] . [log_beta_i, -i * log_beta_i]` is folded into two extra head
    dimensions; a third carries padding. Positions are centred per row, which halves the rounding error;
    the absolute error grows like eps * tokens * |log_beta|.
    """
    groups, width = q.shape[1] // k.shape[1], v.shape[-1]
    t = positions.float()
    t = t - t.mean(-1, keepdim=True).round()
    slope = log_beta.float() / scaling
    extra_q, extra_k = [t, torch.ones_like(t)], [slope, -t[:, None] * slope]
    if valid is not None:
        extra_q.append(torch.ones_like(t))
        extra_k.append(((~valid).float() * (PAD_LOGIT / scaling))[:, None].expand_as(slope))
    fill = -(q.shape[-1] + len(extra_q)) % 8
    q_more = repeat(torch.stack(extra_q, -1), "batch tokens extra -> batch heads tokens extra", heads=q.shape[1])
    q_wide = F.pad(torch.cat([q.float(), q_more], -1), (0, fill))
    k_wide = F.pad(torch.cat([k.float(), torch.stack(extra_k, -1)], -1), (0, fill))
    v_wide = F.pad(v.float(), (0, k_wide.shape[-1] - width))
    k_wide, v_wide = k_wide.repeat_interleave(groups, 1), v_wide.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q_wide, k_wide, v_wide, is_causal=True, scale=scaling)
    return out[..., :width].to(q.dtype)


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
    weights = logits.masked_fill(~_seen(k.shape[2], rows, valid, allowed, q.device), float("-inf")).softmax(-1)
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

    return _in_blocks(block, q)


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
    since = (positions + window + 1)[:, None].expand_as(log_keep)
    return naive_evicted_attention(q, k, v, log_keep, since, positions=positions, **how)


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
    since = (positions + window + 1)[:, None].expand_as(log_keep)
    return evicted_attention(q, k, v, log_keep, since, positions=positions, **how)
