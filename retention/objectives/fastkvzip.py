"""Fast KVzip: predict the largest attention a token will receive, a number in [0, 1] (arXiv 2601.17668)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from retention.objectives.base import GatedCall
from retention.objectives.regression import Regression
from retention.ops.received import largest_received


@dataclass
class FastKVzip(Regression):
    """`y = max over queries and group of A`, binary cross-entropy of `sigmoid(score)` with soft targets.

    Differs from the paper: queries are those of the training sequence instead of a repetition of the context, the
    loss is a mean over layers and heads instead of a sum, and the optimiser is the trainer's. Its own architecture
    is gate=fastkvzip; any other trains as well.
    """

    name: ClassVar[str] = "fastkvzip"
    initial_score: ClassVar[float | None] = -2.0

    def target(self, call: GatedCall, asking: Bool[Tensor, "batch tokens"]) -> Float[Tensor, "batch kv_heads tokens"]:
        """The largest attention probability; NaN where no query asks."""
        best = largest_received(call.queries, call.keys, asking, call.valid, call.scaling)
        return best.exp().masked_fill(best == float("-inf"), float("nan"))

    def error(self, score: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Binary cross-entropy."""
        return F.binary_cross_entropy_with_logits(score, target, reduction="none")
