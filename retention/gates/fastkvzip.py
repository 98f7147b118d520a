"""Fast KVzip's gates: low-rank queries of a token against learned keys and its own (arXiv 2601.17668)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from retention.gates.architecture import GateConfig, GateStack, projection
from retention.ops.decay import offset_for_half_life
from retention.types import ModelShape


@dataclass
class FastKVzip(GateConfig):
    """`p = mean over the group of 1 / (1 + sum_m exp(q.b_m / sqrt(r) - q.k / sqrt(r) - c_h))`, per KV head.

    `q = RMSNorm(Wq x + b)` per query head, `k = RMSNorm(Wk x)` per KV head, rank r, learned base keys b_m. The score
    is the logit of p. Differs from the paper: the offset takes in the log of the number of base keys, so that it
    means the same as in the other gates.
    """

    name: ClassVar[str] = "fastkvzip"
    reads_budget: ClassVar[bool] = False

    bases: int = 16
    """Learned base keys per KV head."""
    norm_eps: float | None = None
    """Added to mean squares before their root; null is the machine's smallest difference from 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bases < 1:
            raise ValueError(f"expected gate.bases of at least 1, got {self.bases}")
        if self.gate_hidden == 0:
            raise ValueError("expected gate.gate_hidden (the rank) above 0 for fastkvzip, got 0")

    def width(self, shape: ModelShape) -> int:
        """The rank; null means 16, or a sixteenth of a small model's hidden size."""
        return max(1, min(16, shape.hidden_size // 16)) if self.gate_hidden is None else self.gate_hidden

    def build(self, shape: ModelShape) -> GateStack:
        """One gate per evictable layer, nothing shared."""
        start = offset_for_half_life(self.init_half_life)
        given = self.width(shape), self.bases, start, self.norm_eps
        return GateStack(nn.ModuleList(LowRank(shape, *given) for _ in shape.layers))


class LowRank(nn.Module):
    """One layer's gate."""

    def __init__(self, shape: ModelShape, rank: int, bases: int, start: float, eps: float | None = None) -> None:
        super().__init__()
        self.kv_heads = shape.num_kv_heads
        self.query = projection(shape.hidden_size, shape.num_heads * rank)
        self.key = nn.Linear(shape.hidden_size, shape.num_kv_heads * rank, bias=False)
        nn.init.normal_(self.key.weight, std=shape.hidden_size**-0.5)
        self.query_norm, self.key_norm = nn.RMSNorm(rank, eps=eps), nn.RMSNorm(rank, eps=eps)
        self.base_keys = nn.Parameter(torch.randn(shape.num_kv_heads, bases, rank))
        self.offset = nn.Parameter(torch.full((shape.num_heads,), start))

    def forward(self, x: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch tokens kv_heads"]:
        """Logit of the mean of the group's probabilities, fp32."""
        rank = self.base_keys.shape[-1]
        q = self.query_norm(self.query(x).unflatten(-1, (self.kv_heads, -1, rank))).float()
        k = self.key_norm(self.key(x).unflatten(-1, (self.kv_heads, 1, rank))).float()
        against = torch.einsum("...hgr,hmr->...hgm", q, self.base_keys.float()) * rank**-0.5
        mean = against.logsumexp(-1) - math.log(against.shape[-1])
        logits = (q * k).sum(-1) * rank**-0.5 - mean + self.offset.float().view(self.kv_heads, -1)
        return F.logsigmoid(logits).logsumexp(-1) - F.logsigmoid(-logits).logsumexp(-1)
