"""Gated attention by FlexAttention: the age term computed per pair of tokens, padding and documents as a block mask.

The truth is `naive_gated_attention`. On CUDA it is compiled by its first call; on a CPU torch runs it uncompiled with
all logits written out, and forward only.
"""

import warnings
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.ops.age_gradient import with_age_gradient


def flex_gated_attention(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    log_beta: Float[Tensor, "batch kv_heads tokens"],
    *,
    scaling: float,
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
    documents: Int[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Gated attention, any dtype; blocks of keys that no query of a block sees are left out.

    The gradient of `log_beta` is a pass of its own: Flex would add it up atomically, pair by pair.

    Raises:
        ValueError: on a CPU where queries, keys or values need a gradient, which torch's Flex has not there.
    """
    if not q.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("expected CUDA tensors for a backward of FlexAttention, got a CPU's; take another form there")
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    groups, decay = q.shape[1] // k.shape[1], log_beta.detach().float()
    blocks = _blocks(q.shape[2], q.device, valid, documents)
    options: dict[str, Any] = {"block_mask": blocks, "scale": float(scaling), "enable_gqa": True}
    options |= {
        "score_mod": lambda score, b, h, t, i: score + (positions[b, t] - positions[b, i]) * decay[b, h // groups, i],
        "return_aux": AuxRequest(lse=True),
    }
    if q.is_cuda:
        out, aux = _compiled()(q, k, v, **options)
    else:
        q, k, v = (x.detach() for x in (q, k, v))  # torch refuses tensors that could need a gradient
        with warnings.catch_warnings():  # that it is not compiled is known
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            out, aux = flex_attention(q, k, v, **options)
    where = {"scaling": scaling, "positions": positions, "valid": valid, "documents": documents}
    return with_age_gradient(out, log_beta, (q, k, v), aux.lse, where)


def _blocks(tokens: int, device: torch.device, valid: Tensor | None, documents: Tensor | None) -> Any:
    """The block mask of a batch; the plain causal one is made once per length."""
    return _causal(tokens, device) if valid is None and documents is None else _made(tokens, device, valid, documents)


@cache
def _causal(tokens: int, device: torch.device) -> Any:
    return _made(tokens, device, None, None)


def _made(tokens: int, device: torch.device, valid: Tensor | None, documents: Tensor | None) -> Any:
    from torch.nn.attention.flex_attention import and_masks, create_block_mask, or_masks

    past = [lambda b, h, t, i: t >= i]
    if valid is not None:
        past.append(lambda b, h, t, i: valid[b, i])
    if documents is not None:
        past.append(lambda b, h, t, i: documents[b, t] == documents[b, i])
    sees = or_masks(and_masks(*past), lambda b, h, t, i: t == i)
    given = valid if valid is not None else documents
    rows = None if given is None else len(given)
    return create_block_mask(sees, rows, None, tokens, tokens, device=str(device), _compile=device.type == "cuda")


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
