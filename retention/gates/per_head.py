"""One number per layer and KV head, whatever the token: what DuoAttention learns (arXiv 2410.10819)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retention.gates.architecture import GateConfig, GateStack
from retention.ops.decay import offset_for_half_life
from retention.types import ModelShape


@dataclass
class PerHead(GateConfig):
    """`score = offset_h`, with the learning rate of offsets; as a decaying gate, one half-life per head.

    It reads no token, so `gate_hidden` has no meaning.
    """

    name: ClassVar[str] = "per_head"
    reads_tokens: ClassVar[bool] = False
    reads_budget: ClassVar[bool] = False

    def build(self, shape: ModelShape) -> GateStack:
        """One offset per head and evictable layer."""
        start = offset_for_half_life(self.init_half_life)
        return GateStack(nn.ModuleList(Constant(shape.num_kv_heads, start) for _ in shape.layers))


class Constant(nn.Module):
    """One layer's numbers."""

    def __init__(self, heads: int, start: float) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.full((heads,), start))

    def forward(self, x: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch tokens kv_heads"]:
        """The same for every token, fp32."""
        return self.offset.float().expand(*x.shape[:-1], -1)
