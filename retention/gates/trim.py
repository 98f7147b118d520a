"""TRIM-KV's gates: a whole gate per layer, nothing shared (arXiv 2512.03324)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from retention.gates.architecture import ACTIVATIONS, GateConfig, GateStack, Head, projection
from retention.types import ModelShape


@dataclass
class Trim(GateConfig):
    """`log_beta = logsigmoid(W2 act(W1 x + b1) + offset)`, one gate per layer (public code).

    `gate_hidden: 0` gives a linear gate, the paper's ablation. Differs from the public code: the activation is a
    setting instead of the model's own, by default SiLU, which all released models use; the start is given as a half-life
    instead of a raw offset.
    """

    name: ClassVar[str] = "trim"

    def build(self, shape: ModelShape) -> GateStack:
        """One trunk with its own head per evictable layer."""
        width = self.width(shape)
        return GateStack(nn.ModuleList(self._layer(shape, width) for _ in shape.layers))

    def _layer(self, shape: ModelShape, width: int) -> nn.Sequential:
        heads, conditioned = shape.num_kv_heads, self.budget_conditioned
        if width == 0:
            return nn.Sequential(Head(shape.hidden_size, heads, heads, self.init_half_life, conditioned=conditioned))
        trunk = projection(shape.hidden_size, width)
        head = Head(width, heads, heads, self.init_half_life, conditioned=conditioned)
        return nn.Sequential(trunk, ACTIVATIONS[self.activation](), head)
