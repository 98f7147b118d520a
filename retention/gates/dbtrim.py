"""DBTrimKV's gates: features per layer, one scoring projection for the whole model (arXiv 2605.09649)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from retention.gates.architecture import ACTIVATIONS, GateConfig, GateStack, Head, projection
from retention.types import ModelShape


@dataclass
class DBTrim(GateConfig):
    """`phi_l = act(W2 act(W1 x))` per layer; the last projection is shared, so scores compare across layers.

    `scoring: rows`: head h of every layer is scored by row h of one shared W and offset (public code).
    `scoring: scalar`: phi_l is cut into one feature vector per head, and a single (w, offset) scores them all
    (the paper's prose; the feature width per head, gate_hidden / heads, is a reconstruction).
    """

    name: ClassVar[str] = "dbtrim"

    scoring: str = "rows"
    """rows or scalar: what the shared projection shares."""
    tied: bool = True
    """One projection for all layers; without, each layer has its own (an option of the public code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scoring not in ("rows", "scalar"):
            raise ValueError(f"expected gate.scoring rows or scalar, got {self.scoring!r}")
        if self.gate_hidden == 0:
            raise ValueError(
                "expected gate.gate_hidden above 0 for dbtrim, got 0; a linear gate is gate=trim gate.gate_hidden=0"
            )

    def build(self, shape: ModelShape) -> GateStack:
        """Two-layer trunks per evictable layer and one shared head, or one for each."""
        width, heads, act = self.width(shape), shape.num_kv_heads, ACTIVATIONS[self.activation]
        if self.scoring == "scalar" and width % heads:
            raise ValueError(f"scoring scalar cuts gate_hidden by head: expected a multiple of {heads}, got {width}")
        shared = self._head(width, heads) if self.tied else None
        trunks = (
            nn.Sequential(projection(shape.hidden_size, width), act(), projection(width, width), act())
            for _ in shape.layers
        )
        if shared is not None:
            return GateStack(nn.ModuleList(trunks), shared)
        return GateStack(nn.ModuleList(trunk.append(self._head(width, heads)) for trunk in trunks))

    def _head(self, width: int, heads: int) -> Head:
        if self.scoring == "rows":
            return Head(width, heads, heads, self.init_half_life, conditioned=self.budget_conditioned)
        return ScalarHead(heads, width // heads, self.init_half_life, conditioned=self.budget_conditioned)


class ScalarHead(Head):
    """One (w, offset) for every layer and head: `s_h = w . phi_h + offset`."""

    def __init__(self, heads: int, width: int, half_life: float, *, conditioned: bool = False) -> None:
        super().__init__(width, 1, 1, half_life, conditioned=conditioned)
        self.heads = heads

    def forward(self, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "..."]:
        """One score per head, or its pair with a slope, from the head's slice of the features."""
        return super().forward(features.unflatten(-1, (self.heads, -1))).squeeze(features.dim())
