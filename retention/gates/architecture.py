"""What an architecture of gates is: its settings, the modules it builds, and the parts they are built from."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from retention.gates.beside import MODALITIES, Grounding
from retention.ops.decay import budget_coordinate, offset_for_half_life
from retention.types import ModelShape, require

BESIDE = (
    *("budget_conditioned", "budget_min", "budget_max", "budget_ref", "modality", "text_prior"),
    *("activation", "delayed", "tied", "norm_eps"),
)
"""Settings that artefacts name only where they are not the default, so that older versions read plain gates."""
ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU}


@dataclass
class GateConfig(ABC):
    """An architecture of gates; `build` makes its modules for a model's shape."""

    name: ClassVar[str]
    reads_tokens: ClassVar[bool] = True
    """Whether it looks at tokens at all, so that modality and text_prior mean something."""
    reads_budget: ClassVar[bool] = True
    """Whether budget_conditioned is there."""

    gate_hidden: int | None = None
    """Width of the gate's hidden layers; null means 512, or 7/16 of a small model's hidden size."""
    init_half_life: float = 10_000.0
    """Half-life in tokens at the start of training."""
    budget_conditioned: bool = False
    """Scores grow with the budget in force, so that one artefact serves many (a reconstruction)."""
    budget_min: float = 16.0
    """Smallest training budget in entries per head, for budget_conditioned."""
    budget_max: float = 1024.0
    """Largest training budget in entries per head, for budget_conditioned."""
    budget_ref: float | None = None
    """Budget at which scores are what they are without conditioning; null is the geometric mean of both."""
    modality: str = "none"
    """none, or embedding: a learned vector for text and one for vision, added to what the gate reads."""
    text_prior: bool = False
    """The gate also reads how near a token is to the text before it."""
    activation: str = "silu"
    """silu, gelu or relu: behind the gate's hidden layers, where it has any."""
    delayed: bool = False
    """Each token is scored by reading the one behind it, and the newest stays until that one is there; for gates that
    were trained so elsewhere (DMS)."""

    def __post_init__(self) -> None:
        self._check_beside()
        if self.gate_hidden is not None and self.gate_hidden < 0:
            raise ValueError(f"expected gate.gate_hidden of 0 (linear) or more, got {self.gate_hidden}")
        offset_for_half_life(self.init_half_life)

    def _check_beside(self) -> None:
        """Refuse what the gate cannot read."""
        reference = 1.0 if self.budget_ref is None else self.budget_ref
        beside = self.modality != "none" or self.text_prior
        checks = (
            (self.modality in MODALITIES, "gate.modality none or embedding", self.modality),
            (self.reads_tokens or not beside, f"no gate.modality and gate.text_prior for gate={self.name}", "one"),
            (self.reads_budget or not self.budget_conditioned, "gate.budget_conditioned for trim or dbtrim", self.name),
            (self.activation in ACTIVATIONS, f"gate.activation among {', '.join(ACTIVATIONS)}", self.activation),
            (
                not (self.delayed and self.budget_conditioned),
                "gate.delayed or gate.budget_conditioned, not both",
                "both",
            ),
            (
                0 < self.budget_min < self.budget_max and reference > 0,
                "gate budgets above 0, gate.budget_max above gate.budget_min",
                (self.budget_min, self.budget_max, self.budget_ref),
            ),
        )
        require(checks)

    @abstractmethod
    def build(self, shape: ModelShape) -> "GateStack":
        """Fresh modules for a model of this shape."""

    def grounding(self, shape: ModelShape) -> nn.ModuleList | None:
        """What each layer's gate reads beside its input; None where that is nothing."""
        if self.modality == "none" and not self.text_prior:
            return None
        given = {"modality": self.modality != "none", "text_prior": self.text_prior}
        return nn.ModuleList(Grounding(shape.hidden_size, **given) for _ in shape.layers)

    def coordinate(self, budget: Shaped[Tensor, " batch"] | None) -> Float[Tensor, " batch"] | None:
        """What conditioned gates make of a budget in entries per head; None is their reference."""
        if budget is None or not self.budget_conditioned:
            return None
        reference = (self.budget_min * self.budget_max) ** 0.5 if self.budget_ref is None else self.budget_ref
        return budget_coordinate(budget, self.budget_min, self.budget_max, reference)

    def width(self, shape: ModelShape) -> int:
        """The hidden width, resolved for a model."""
        return min(512, shape.hidden_size * 7 // 16) if self.gate_hidden is None else self.gate_hidden

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the architecture's name."""
        plain = {field.name: field.default for field in fields(self) if field.name in BESIDE}
        return {"name": self.name} | {k: v for k, v in asdict(self).items() if k not in plain or v != plain[k]}


class GateStack(nn.Module):
    """Per-layer trunks and, where the architecture shares one, a head for all layers."""

    def __init__(self, layers: nn.ModuleList, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = layers
        self.shared = shared
        self.grounding: nn.ModuleList | None = None

    def score(
        self, layer: int, hidden_states: Float[Tensor, "batch tokens hidden"]
    ) -> Float[Tensor, "batch tokens kv_heads ..."]:
        """Pre-activation of the gate, last projection in fp32; of conditioned gates a pair of score and slope."""
        features = self.layers[layer](hidden_states)
        return features if self.shared is None else self.shared(features)


class Head(nn.Module):
    """A last projection with its offset, both fp32: `s = W phi + offset`.

    Conditioned, `s(u) = W phi + offset + u (softplus(growth) + tilt phi)` for the budget's coordinate u: half-lives
    grow with the budget, and the tilt, 0 at the start, lets tokens differ in how much (a reconstruction).
    """

    def __init__(self, width: int, outputs: int, offsets: int, half_life: float, *, conditioned: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, width))
        self.offset = nn.Parameter(torch.full((offsets,), offset_for_half_life(half_life)))
        nn.init.normal_(self.weight, std=width**-0.5)
        self.growth = nn.Parameter(torch.full((offsets,), -4.0)) if conditioned else None
        self.tilt = nn.Parameter(torch.zeros(outputs, width)) if conditioned else None

    def forward(self, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "..."]:
        """fp32 whatever the trunk's dtype; conditioned, the pair of score at u = 0 and slope, last."""
        score = features.float() @ self.weight.T.float() + self.offset.float()
        if self.growth is None or self.tilt is None:
            return score
        return torch.stack([score, features.float() @ self.tilt.T.float() + F.softplus(self.growth.float())], -1)


def projection(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with weights N(0, 1 / inputs) and zero bias.

    The public code of arXiv 2512.03324 draws with the model's initializer range, 0.02: the same at 2,500
    features, far too little to start from on a small model.
    """
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    nn.init.zeros_(layer.bias)
    return layer
