"""Gated attention in bfloat16 through fused kernels, its age term as accurate as in fp32.

`(t - i) * log_beta_i` is folded into eight extra head dimensions whose numbers are sums of bfloat16 terms, so that the
kernel, which adds in fp32, loses only their last digits. Its backward loses more: it rounds sums over queries before
they cancel, so the gradient of `log_beta` is computed apart (`retention/ops/age_gradient.py`).
The truth is `naive_gated_attention`. A reconstruction, measured in docs/benchmarks/gated_attention.md.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from retention.ops.age_gradient import with_age_gradient
from retention.ops.attention import PAD_LOGIT

EXTRA = 8
"""Head dimensions of the age term."""

QUERIES = 16384
"""Queries per fused call. Each call counts positions from its own centre, so the error stops growing here."""

STEEPEST = 16.0
"""Gates that forget faster count as this fast: a key weighs 1e-7 after one token either way."""

WIDEST = 256
"""Head dimensions that flash kernels take."""


def age_error(span: int, steepest: float) -> float:
    """Bound of the age term's error, in logits, where the term is above -20: older keys weigh nothing.

    `span`: positions from the first to the last query of a call; `steepest`: the largest `-log_beta`. One part is a last
    term of the slope that low digits of positions do without; the next, fp32 sums of terms as large as
    `span / 2 * steepest`, and the last, a rounding of the term, are the fp32 form's own.
    """
    return steepest * (2**-9 + 2**-23 * span) + 2**-19


def split_fits(dtype: torch.dtype, device: torch.device, head_dim: int, value_dim: int) -> bool:
    """Whether the split form is accurate, can run and pays for such tensors; if not, the fp32 form is to be taken.

    bfloat16 only: slopes of half-lives from 1 to 1e6 tokens times positions span more binary orders of magnitude than
    the 30 of float16. With `QUERIES` positions a call, `age_error` is one bfloat16 rounding of `log_beta` (2^-8 of it)
    at any length. Flash kernels ask for compute capability 8.0; on a CPU the fp32 form trains faster.
    """
    if dtype != torch.bfloat16 or max(head_dim + EXTRA, value_dim) > WIDEST or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def bf16_terms(x: Float[Tensor, "*shape"], count: int) -> list[Float[Tensor, "*shape"]]:
    """bfloat16 tensors that sum to an fp32 one: two of them to 2^-17 of it, three to 2^-25."""
    terms = []
    for _ in range(count):
        terms.append(x.bfloat16())
        x = x - terms[-1].float()
    return terms


def split_dimensions(
    slope: Float[Tensor, "batch kv_heads tokens"],
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None,
    *,
    first: int,
    pad: float,
) -> tuple[Float[Tensor, "batch queries extra"], Float[Tensor, "batch kv_heads tokens extra"]]:
    """What queries from `first` on and keys carry, so that the product of the two is `(t - i) * slope`.

    `t = 256 a + b`, both exact in bfloat16; queries carry [a a a b b 1 1 1] (a times 256), keys [S1 S2 S3 S1 S2 C1 C2 C3]
    with `slope = S1 + S2 + S3`. C takes i times the terms that i's own digits meet, so that the term is 0 at age 0.
    Padded keys have slope 0 and C at `pad`.
    """
    own = positions[:, first:]
    centred = positions - (own.amin(1, keepdim=True) + own.amax(1, keepdim=True)) // 2
    high = (centred + 128) // 256 * 256
    high, low = high.float(), (centred - high).float()
    terms = bf16_terms(slope if valid is None else slope.masked_fill(~valid[:, None], 0.0), 3)
    most = terms[0].float() + terms[1].float()
    offset = -(high[:, None] * (most + terms[2].float()) + low[:, None] * most)
    if valid is not None:
        offset = offset.masked_fill(~valid[:, None], pad)
    one = torch.ones_like(high)
    queries = torch.stack([high, high, high, low, low, one, one, one], -1)[:, first:].bfloat16()
    return queries, torch.stack([*terms, *terms[:2], *bf16_terms(offset, 3)], -1)


def split_gated_attention(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    log_beta: Float[Tensor, "batch kv_heads tokens"],
    *,
    scaling: float,
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Gated attention through a fused causal call per `QUERIES` queries; rows of padded queries are undefined.

    The gradient of `log_beta` is fp32's. Positions of a call's queries span at most 131,072, as indices of a sequence
    do; beyond that they are rounded.

    Raises:
        ValueError: if queries, keys and values are not all bfloat16.
    """
    if {x.dtype for x in (q, k, v)} != {torch.bfloat16}:
        found = ", ".join(str(x.dtype) for x in (q, k, v))
        raise ValueError(
            f"expected queries, keys and values in bfloat16, got {found}; take the form 'augmented' or none"
        )
    width, value_width, tokens = q.shape[-1], v.shape[-1], q.shape[2]
    total = max(width + EXTRA, value_width)
    fill = total + -total % 8 - width - EXTRA
    v_wide = F.pad(v, (0, width + EXTRA + fill - value_width))
    log_beta = log_beta.float().clamp(min=-STEEPEST)
    slope, outs = log_beta.detach() / scaling, []
    for first in range(0, tokens, QUERIES):
        end = min(first + QUERIES, tokens)
        valid_now = None if valid is None else valid[:, :end]
        known = (slope[:, :, :end], positions[:, :end], valid_now)
        more_q, more_k = split_dimensions(*known, first=first, pad=PAD_LOGIT / scaling)
        more_q = more_q[:, None].expand(-1, q.shape[1], -1, -1)
        q_wide = F.pad(torch.cat([q[:, :, first:end], more_q], -1), (0, fill))
        k_wide = F.pad(torch.cat([k[:, :, :end], more_k], -1), (0, fill))
        out, lse = fused_causal(q_wide, k_wide, v_wide[:, :, :end], scaling)
        narrow = (q_wide[..., :width], k_wide[..., :width], v_wide[:, :, :end, :value_width])
        where = {"scaling": scaling, "positions": positions[:, :end], "valid": valid_now}
        outs.append(with_age_gradient(out[..., :value_width], log_beta[:, :, :end], narrow, lse, where))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def fused_causal(
    q: Float[Tensor, "batch heads queries width"],
    k: Float[Tensor, "batch kv_heads tokens width"],
    v: Float[Tensor, "batch kv_heads tokens width"],
    scaling: float,
) -> tuple[Float[Tensor, "batch heads queries width"], Float[Tensor, "batch heads queries"]]:
    """Attention of the last queries and its log-sum-exp, by the flash kernel behind SDPA, which returns the former alone.

    Kernels on CUDA line the last query up with the last key by themselves and know grouped heads.
    """
    if q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=float(scaling))[:2]
        return out, lse[..., : q.shape[2]]
    groups, queries, tokens = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    mask = None
    if queries < tokens:
        hidden = torch.ones(queries, tokens, dtype=torch.bool, device=q.device).triu(tokens - queries + 1)
        mask = torch.zeros(queries, tokens, dtype=q.dtype, device=q.device).masked_fill(hidden, float("-inf"))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q, k, v, 0.0, mask is None, attn_mask=mask, scale=float(scaling))
    return out, lse
