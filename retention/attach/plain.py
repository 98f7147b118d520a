"""The attention a model has without us: fused where its logits are plain, the model's own code where they are not."""

import sys
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retention.ops.logits import Scaling


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers computes it: SDPA, or the eager form of a model that caps its logits.

    The mask is SDPA's: boolean [batch, 1 or heads, queries, keys], or None for causal.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if kwargs.get("softcap") is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    bias = _bias(attention_mask, query, key)
    out, _ = eager(module, query, key, value, bias, dropout=dropout, scaling=scaling, **kwargs)
    return out, None


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """What eager attention adds to its logits: nothing, or the least number where a key is hidden."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None and queries == 1:
        return None
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[None, None]
    return torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)


def output_weight(module: nn.Module) -> Float[Tensor, "hidden features"] | None:
    """Weight of the projection behind attention; None under another name, or where it is held quantised."""
    weight = getattr(getattr(module, "o_proj", None), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() else None


def logit_scaling(query: Tensor, scaling: float | None, softcap: float | None) -> Scaling:
    """How logits of a call are scaled and capped; without a factor by the square root of the width."""
    return Scaling(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
