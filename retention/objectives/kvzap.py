"""KVzap: predict the log of how much a token's value will move the model (arXiv 2601.07891)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retention.objectives.base import GatedCall
from retention.objectives.regression import Regression
from retention.ops.output_norms import l2_output_norms
from retention.ops.received import largest_received

TINY = 1e-20


@dataclass
class KVzap(Regression):
    """`y = log max over queries and group of A * ||W_O v|| / ||x||`, mean squared error.

    `A` is attention from a later query, `x` that query's attention input. Differs from the paper: queries are
    those of the training sequence instead of a repetition of the context, every token is fitted instead of a
    sample of 500, and the optimiser is the trainer's, so that objectives are compared at equal cost.
    """

    name: ClassVar[str] = "kvzap"
    initial_score: ClassVar[float | None] = -4.0

    def target(self, call: GatedCall, asking: Bool[Tensor, "batch tokens"]) -> Float[Tensor, "batch kv_heads tokens"]:
        """Log of the largest share of a later query's residual stream."""
        if call.output is None:
            raise ValueError(
                "objective kvzap needs the weight of the projection behind attention (o_proj), this model has none "
                "of that name; use objective=fastkvzip"
            )
        sizes = l2_output_norms(call.values, call.output, call.queries.shape[1])
        return largest_received(
            call.queries,
            call.keys,
            asking,
            call.valid,
            call.scaling,
            key_term=sizes.clamp(min=TINY).log(),
            query_term=-call.hidden.float().norm(dim=-1).clamp(min=TINY).log(),
        )

    def error(self, score: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Squared."""
        return torch.square(score - target)
