"""The gradient of `log_beta` in gated attention, `sum over queries of age * d loss / d logit`, in fp32.

Fused kernels return it as a difference of large rounded sums, or by an atomic addition per pair of tokens. Here a third
pass makes the weights anew from the log-sum-exp, as flash attention's backward does, and sums ages that are exact.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.ops.blocks import BLOCK
from retention.ops.decay import age
from retention.ops.kernels import has_triton

Tensors = tuple[Float[Tensor, "..."], Float[Tensor, "..."], Float[Tensor, "..."]]


def with_age_gradient(
    out: Float[Tensor, "batch heads queries value_dim"],
    log_beta: Float[Tensor, "batch kv_heads tokens"],
    narrow: Tensors,
    lse: Float[Tensor, "batch heads queries"],
    where: dict[str, Any],
) -> Float[Tensor, "batch heads queries value_dim"]:
    """An attention output that knows nothing of `log_beta`, as one whose backward does.

    `narrow`: queries, keys and values of the output; `where`: further arguments of `age_gradient`.
    """
    result: Tensor = _WithAgeGradient.apply(out, log_beta, *(x.detach() for x in narrow), lse.detach(), where)
    return result


class _WithAgeGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, log_beta: Tensor, *rest: Any) -> Tensor:
        *tensors, ctx.where = rest
        ctx.save_for_backward(log_beta, *tensors, out)
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        more = None
        if ctx.needs_input_grad[1]:
            log_beta, q, k, v, lse, out = ctx.saved_tensors
            more = age_gradient(log_beta, q, k, v, lse, out, grad, **ctx.where).to(log_beta.dtype)
        return grad, more, None, None, None, None, None


def naive_age_gradient(
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
    """The sum with all pairs written out; the queries are the last tokens.

    `lse`: log-sum-exp of the logits; `out`, `grad`: the attention's output and the gradient it was given. A key sees
    padding and other documents as attention does; its own query has age 0 and counts for nothing.
    """
    first, groups = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    columns = torch.arange(k.shape[2], device=q.device)
    seen = (columns <= columns[first:, None])[None]
    if valid is not None:
        seen = seen & valid[:, None]
    if documents is not None:
        seen = seen & (documents[:, first:, None] == documents[:, None])
    ages = age(positions[:, first:], positions).float()[:, None, None]
    q, lse, out, grad = (x.float().unflatten(1, (-1, groups)) for x in (q, lse, out, grad))
    k, v = (x.float()[:, :, None].mT for x in (k, v))
    logits = scaling * q @ k + ages * log_beta.float()[:, :, None, None]
    weights = (logits - lse[..., None]).masked_fill(~seen[:, None, None], float("-inf")).exp()
    slopes = weights * (grad @ v - (grad * out).sum(-1, keepdim=True))
    return (slopes * ages).sum((2, 3))


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
    """The same in blocks of queries; on CUDA one Triton kernel, where triton is installed."""
    if q.is_cuda and has_triton():
        from retention.ops.age_gradient_triton import age_gradient as fused

        return fused(
            log_beta, q, k, v, lse, out, grad, scaling=scaling, positions=positions, valid=valid, documents=documents
        )
    first, total = k.shape[2] - q.shape[2], torch.zeros_like(log_beta, dtype=torch.float32)
    for at in range(0, q.shape[2], BLOCK):
        rows = slice(at, min(at + BLOCK, q.shape[2]))
        end = first + rows.stop
        near = [x[:, :, rows] for x in (lse, out, grad)]
        given = (log_beta[:, :, :end], q[:, :, rows], k[:, :, :end], v[:, :, :end], *near)
        where: dict[str, Any] = {"positions": positions, "valid": valid, "documents": documents}
        where = {name: None if x is None else x[:, :end] for name, x in where.items()}
        total[:, :, :end] += naive_age_gradient(*given, scaling=scaling, **where)
    return total
