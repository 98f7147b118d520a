"""Gated attention, a naive truth and a fast twin each: by decay (`scale q.k + age * log_beta`), and delayed.

Training self-attention only (queries are the keys), causal, one document per row, left or right padding.
Sources: arXiv 2512.03324, eq. 3 (additive form); arXiv 2506.05345 (delayed).
"""

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from retention.ops.decay import age

BLOCK = 256
PAD_LOGIT = -1e4
"""Added to padded keys by the fused form; large against any logit, small enough for exact fp32 sums."""


def naive_gated_attention(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens head_dim"],
    log_beta: Float[Tensor, "batch kv_heads tokens"],
    *,
    scaling: float,
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Gated attention with the whole bias written out; rows of padded queries are undefined."""
    groups = q.shape[1] // k.shape[1]
    k, v, log_beta = (x.repeat_interleave(groups, 1) for x in (k, v, log_beta))
    ages = age(positions, positions)[:, None]
    logits = scaling * q.float() @ k.float().transpose(-1, -2) + ages * log_beta.float()[:, :, None]
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    allowed = causal if valid is None else causal & valid[:, None, None]
    allowed = allowed | torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
    weights = logits.masked_fill(~allowed, float("-inf")).softmax(-1)
    return (weights @ v.float()).to(q.dtype)


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


def naive_delayed_attention(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    log_keep: Float[Tensor, "batch kv_heads tokens"],
    *,
    window: int,
    scaling: float,
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
    first: int = 0,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention with `log_keep` of a key added to its logits for queries more than `window` tokens behind it.

    `first`: the token that the first query is. Rows of padded queries are undefined.
    """
    groups, last = q.shape[1] // k.shape[1], first + q.shape[2]
    ages = age(positions[:, first:last], positions)[:, None]
    k, v, log_keep = (x.repeat_interleave(groups, 1).float() for x in (k, v, log_keep))
    bias = torch.where(ages > window, log_keep[:, :, None], 0.0)
    rows = torch.arange(first, last, device=q.device)[:, None]
    columns = torch.arange(k.shape[2], device=q.device)
    allowed = columns <= rows if valid is None else (columns <= rows) & valid[:, None, None]
    allowed = allowed | (columns == rows)
    weights = (scaling * q.float() @ k.transpose(-1, -2) + bias).masked_fill(~allowed, float("-inf")).softmax(-1)
    return (weights @ v).to(q.dtype)


def delayed_attention(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    log_keep: Float[Tensor, "batch kv_heads tokens"],
    *,
    window: int,
    scaling: float,
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """The same in blocks of queries, computed again in the backward: no tokens x tokens map is kept."""

    def block(rows: Tensor, first: int) -> Tensor:
        return naive_delayed_attention(
            rows, k, v, log_keep, window=window, scaling=scaling, positions=positions, valid=valid, first=first
        )

    starts = range(0, q.shape[2], BLOCK)
    parts = [checkpoint(block, q[:, :, start : start + BLOCK], start, use_reentrant=False) for start in starts]
    return torch.cat(parts, 2)
