"""Retention-gated attention, `scale q.k + age * log_beta`: the naive truth and its twins for any torch device.

Training self-attention only (queries are the keys), causal unless told otherwise, left or right padding. Other twins of
the same truth: `retention/ops/split.py` (half precision), `retention/ops/flex.py`; `retention/ops/gated.py` picks one.
Source: arXiv 2512.03324, eq. 3 (additive form).
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from retention.ops.blocks import in_blocks, seen
from retention.ops.decay import age
from retention.ops.logits import capped, softcap_of

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
    documents: Int[Tensor, "batch tokens"] | None = None,
    first: int = 0,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Gated attention with the whole bias written out; rows of padded queries are undefined.

    `allowed`: what each token sees, instead of its past; keys ahead do not decay. `documents`: the number of the
    document that each token is of; none sees another. `first`: the token that the first query is. A cap that belongs
    to the scaling is applied before the bias.
    """
    groups, rows = q.shape[1] // k.shape[1], slice(first, first + q.shape[2])
    k, v, log_beta = (x.repeat_interleave(groups, 1).float() for x in (k, v, log_beta))
    ages = age(positions[:, rows], positions).clamp(min=0)[:, None]
    hidden = ~seen(k.shape[2], rows, valid, allowed, q.device, documents)
    bias = (ages * log_beta[:, :, None]).masked_fill(hidden, float("-inf"))
    weights = (capped(scaling * q.float() @ k.transpose(-1, -2), scaling) + bias).softmax(-1)
    return (weights @ v).to(q.dtype)


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
    documents: Int[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """The same in blocks of queries, computed again in the backward: for masks that are not causal and capped logits.

    Without a cap each block is one SDPA call with the bias as its mask.
    """
    groups = q.shape[1] // k.shape[1]

    def block(rows: Tensor, first: int) -> Tensor:
        if softcap_of(scaling) is not None:
            where: dict[str, Any] = {"positions": positions, "valid": valid, "allowed": allowed, "first": first}
            return naive_gated_attention(rows, k, v, log_beta, scaling=scaling, documents=documents, **where)
        own = slice(first, first + rows.shape[2])
        ages = age(positions[:, own], positions).clamp(min=0)[:, None]
        bias = ages * log_beta.float()[:, :, None]
        bias = bias.masked_fill(~seen(k.shape[2], own, valid, allowed, q.device, documents), float("-inf")).to(q.dtype)
        wide = (x.repeat_interleave(groups, 1) for x in (k, v, bias))
        keys, values, mask = wide
        return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scaling)

    return in_blocks(block, q)


def augmented_gated_attention(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    log_beta: Float[Tensor, "batch kv_heads tokens"],
    *,
    scaling: float,
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """The same through one fused causal SDPA call, without a tokens x tokens bias, in fp32."""
    groups, width = q.shape[1] // k.shape[1], v.shape[-1]
    more_q, more_k = age_dimensions(log_beta.float() / scaling, positions, valid, pad=PAD_LOGIT / scaling)
    total = max(q.shape[-1] + more_q.shape[-1], width)
    fill = total + -total % 8 - q.shape[-1] - more_q.shape[-1]
    more_q = more_q[:, None].expand(-1, q.shape[1], -1, -1)
    q_wide = F.pad(torch.cat([q.float(), more_q], -1), (0, fill))
    k_wide = F.pad(torch.cat([k.float(), more_k], -1), (0, fill))
    v_wide = F.pad(v.float(), (0, k_wide.shape[-1] - width))
    k_wide, v_wide = k_wide.repeat_interleave(groups, 1), v_wide.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q_wide, k_wide, v_wide, is_causal=True, scale=scaling)
    return out[..., :width].to(q.dtype)


def age_dimensions(
    slope: Float[Tensor, "batch kv_heads tokens"],
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None,
    *,
    pad: float,
) -> tuple[Float[Tensor, "batch tokens extra"], Float[Tensor, "batch kv_heads tokens extra"]]:
    """What queries and keys carry, so that the product of the two is `(t - i) * slope`, with `pad` added for padded keys.

    `(t - i) * slope_i = [t, 1] . [slope_i, -i * slope_i]`. Positions are centred per row, which halves the rounding
    error; it grows like eps * tokens * |slope|.
    """
    t = positions.float()
    t = t - t.mean(-1, keepdim=True).round()
    extra_q, extra_k = [t, torch.ones_like(t)], [slope, -t[:, None] * slope]
    if valid is not None:
        extra_q.append(torch.ones_like(t))
        extra_k.append(((~valid).float() * pad)[:, None].expand_as(slope))
    return torch.stack(extra_q, -1), torch.stack(extra_k, -1)
