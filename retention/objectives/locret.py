"""Locret: predict the largest attention logit a token will get from an answer's queries (arXiv 2410.01805)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from retention.objectives.base import Collected, GatedCall, Step
from retention.objectives.regression import Regression
from retention.ops.received import largest_received
from retention.types import LossTerms, ModelShape


@dataclass
class Locret(Regression):
    """`y = max over answer queries and group of q . k / sqrt(D)`, before the softmax; smooth L1, and smooth scores.

    Differs from the paper: gates read the attention input, of which queries, keys and values before their rotation
    are linear maps, so that all objectives train the same architecture; the smoothness is a mean over layers instead
    of a sum; the optimiser is the trainer's.
    """

    name: ClassVar[str] = "locret"
    initial_score: ClassVar[float | None] = 0.0

    queries: str = "answers"
    """later (every later token of the sequence) or answers (those that predict a scored label)."""
    smoothness_weight: float = 0.0025
    """Weight of the squared difference between the scores of neighbouring tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smoothness_weight < 0:
            raise ValueError(f"expected objective.smoothness_weight of 0 or more, got {self.smoothness_weight}")

    def target(self, call: GatedCall, asking: Bool[Tensor, "batch tokens"]) -> Float[Tensor, "batch kv_heads tokens"]:
        """The largest logit."""
        return largest_received(call.queries, call.keys, asking, call.valid, call.scaling, normalise=False)

    def error(self, score: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Squared near the target, absolute away from it."""
        return F.smooth_l1_loss(score, target, reduction="none")

    def counts(self, step: Step, valid: Bool[Tensor, "batch tokens"], shape: ModelShape) -> dict[str, float]:
        """That of the regression; neighbours in every layer and head."""
        neighbours = float((valid[:, 1:] & valid[:, :-1]).sum())
        smooth = {"smoothness": neighbours * shape.num_layers * shape.num_kv_heads}
        return super().counts(step, valid, shape) | smooth

    def loss(self, collected: Collected) -> tuple[LossTerms, dict[str, Tensor]]:
        """The regression, and the smoothness of scores along the sequence."""
        terms, figures = super().loss(collected)
        scores = torch.stack(collected.score)
        pairs = (collected.valid[:, 1:] & collected.valid[:, :-1])[None, :, None].expand_as(scores[..., 1:])
        steps = torch.square(scores.diff(dim=-1)).masked_fill(~pairs, 0.0)
        terms.terms["smoothness"] = (steps.sum(), pairs.sum().float())
        terms.weights["smoothness"] = self.smoothness_weight
        return terms, figures
