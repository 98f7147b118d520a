"""Feature maps of a linear memory: what its state is written and read with."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

FEATURE_MAPS = ("mlp", "hedgehog", "elu1", "identity")


class FeatureMap(nn.Module):
    """Features of keys or queries, one map per KV head, positive but for the identity.

    mlp is softplus of a two-layer map (LESS, arXiv 2402.09398, takes its absolute value), hedgehog the softmax of a
    linear map and of its negative (arXiv 2402.04347), elu1 is `elu + 1` (arXiv 2006.16236).
    """

    def __init__(self, kind: str, features: int, hidden: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.kind = kind
        width = {"mlp": features, "hedgehog": features // 2}.get(kind, 0)
        hidden = hidden if kind == "mlp" else head_dim
        self.first = nn.Parameter(torch.randn(kv_heads, head_dim, hidden) * head_dim**-0.5) if kind == "mlp" else None
        self.last = nn.Parameter(torch.randn(kv_heads, hidden, width) * hidden**-0.5) if width else None
        self.bias = nn.Parameter(torch.zeros(kv_heads, 1, width)) if width else None

    def forward(self, x: Float[Tensor, "batch kv_heads n head_dim"]) -> Float[Tensor, "batch kv_heads n features"]:
        """At least 0 unless the map is the identity."""
        if self.last is None or self.bias is None:
            return x if self.kind == "identity" else F.elu(x) + 1
        hidden = x if self.first is None else F.gelu(x @ self.first)
        scores = hidden @ self.last + self.bias
        if self.kind == "mlp":
            return F.softplus(scores)
        return torch.cat([scores.softmax(-1), (-scores).softmax(-1)], -1)
