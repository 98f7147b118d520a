"""What objectives share that fit the gates' scores to attention seen in one frozen forward: no student, no teacher."""

from abc import abstractmethod
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retention.losses import IGNORE
from retention.objectives.base import Attended, Collected, GatedCall, Objective, Step
from retention.types import LossTerms, ModelShape

QUERIES = ("later", "answers")


@dataclass
class Regression(Objective):
    """Each token's target is the most it receives from asking queries behind it; tokens nobody asks about are left out.

    The asking queries are those of the training sequence itself: the published methods read the context a second
    time, or let the model write an answer, which costs further forwards.
    """

    score_kind: ClassVar[str] = "static"
    teacher: ClassVar[bool] = False

    queries: str = "later"
    """later (every later token of the sequence) or answers (those that predict a scored label)."""

    def __post_init__(self) -> None:
        if self.queries not in QUERIES:
            raise ValueError(f"expected objective.queries {' or '.join(QUERIES)}, got {self.queries!r}")

    @abstractmethod
    def target(self, call: GatedCall, asking: Bool[Tensor, "batch tokens"]) -> Float[Tensor, "batch kv_heads tokens"]:
        """What scores are fitted to, fp32; not finite where no asking query comes behind a token."""

    @abstractmethod
    def error(self, score: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Loss of each score."""

    def asking(self, labels: Tensor, valid: Bool[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """Which tokens ask."""
        if self.queries == "later":
            return valid
        scored = torch.zeros_like(valid)
        scored[:, :-1] = labels[:, 1:] != IGNORE
        return scored & valid

    @torch.no_grad()
    def attend(self, call: GatedCall, step: Step) -> Attended:
        """The model's own attention; its targets are noted, a layer at a time."""
        return None, self.target(call, self.asking(step.labels, call.valid))

    def counts(self, step: Step, valid: Bool[Tensor, "batch tokens"], shape: ModelShape) -> dict[str, float]:
        """Tokens with an asking query behind them, in every layer and head."""
        asking = self.asking(step.labels, valid).long()
        behind = asking.sum(1, keepdim=True) - asking.cumsum(1) > 0
        return {"regression": float((behind & valid).sum()) * shape.num_layers * shape.num_kv_heads}

    def loss(self, collected: Collected) -> tuple[LossTerms, dict[str, Tensor]]:
        """Mean error over tokens, heads and layers; logged beside it: means of scores and targets."""
        score, target = torch.stack(collected.score), torch.stack(collected.noted)
        known = torch.isfinite(target) & collected.valid[None, :, None]
        error = self.error(score, target.masked_fill(~known, 0.0)).masked_fill(~known, 0.0)
        count = known.sum().float()
        means = ((x.detach().masked_fill(~known, 0.0).sum() / count.clamp(min=1)) for x in (score, target))
        figures = dict(zip(("score", "target"), means, strict=True))
        return LossTerms({"regression": (error.sum(), count)}, {"regression": 1.0}), figures

    def describe(self) -> dict[str, object]:
        """The objective and its settings."""
        return {"objective": self.name, "score_kind": self.score_kind, **asdict(self)}
