"""The attention a model has without us: fused where its logits are plain, the model's own code where they are not."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retention.ops.logits import Scaling


@dataclass(frozen=True)
class AttentionCall:
    """What transformers hands its attention function: one layer's heads, and how they are to attend."""

    module: nn.Module
    query: Float[Tensor, "batch heads queries head_dim"]
    key: Float[Tensor, "batch kv_heads keys head_dim"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    mask: Tensor | None
    """SDPA's: boolean [batch, 1 or heads, queries, keys], or None for causal."""
    how: dict[str, Any]
    """The factor of the logits, their cap, dropout, and what else the model says."""

    @property
    def scaling(self) -> Scaling:
        """How logits are scaled and capped; without a factor by the square root of the width."""
        factor = self.how.get("scaling")
        return Scaling(self.query.shape[-1] ** -0.5 if factor is None else factor, self.how.get("softcap"))

    def plain(self) -> Float[Tensor, "batch queries heads value_dim"]:
        """The model's own attention."""
        return plain_attention(self.module, self.query, self.key, self.value, self.mask, **self.how)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> Float[Tensor, "batch queries heads value_dim"]:
    """Attention as transformers computes it: SDPA, or the eager form of a model that caps its logits.

    The mask is SDPA's: boolean [batch, 1 or heads, queries, keys], or None for causal.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if kwargs.get("softcap") is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)[0]
    eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    bias = _bias(attention_mask, query, key)
    out: Tensor = eager(module, query, key, value, bias, dropout=dropout, scaling=scaling, **kwargs)[0]
    return out


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
