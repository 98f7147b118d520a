"""PrefixKV: layers keep what it takes to hold one part of their attention, the same for all (arXiv 2412.03409)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retention.ops.scores import mass_by_position, mean_over_heads
from retention.policies.base import Policy
from retention.types import KVState

STEPS = 40


@dataclass
class PrefixKV(Policy):
    """`score = attention received, summed over all queries so far`, mean over heads: one ranking for a layer's heads.

    With a layer's scores sorted and scaled to sum 1, `budget_l(p)` is the smallest number that adds up to p; p, one
    for all layers, is found by bisection so that the budgets add up to the total. Published with the first 4 tokens
    and the last one kept: `cache.sink_size=4`, `cache.recent_size=1`.

    The online form, per sample. Differs from the paper: totals are exact (what the bisection leaves over is shared in
    proportion), and decoded tokens stay (there one at a fixed place is deleted at each step).
    """

    collector = "column_sums"
    allocator = "weighted"
    evicts_while_decoding = False

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Column sums, mean over heads, fp32."""
        return mean_over_heads(self.observed(kv, "column_sums"), kv.positions, kv.valid)

    def layer_weight(self, kv: KVState) -> Float[Tensor, "batch positions"]:
        """The sorted scores, scaled to sum 1."""
        received, length = self.observed(kv, "column_sums"), int(kv.seen.max())
        mass = mass_by_position(received, kv.positions, kv.valid, length).double().sort(-1, descending=True).values
        return mass / mass.sum(-1, keepdim=True).clamp(min=1e-300)

    def layer_weights(
        self, readings: Float[Tensor, "layers batch positions"], budgets: Int[Tensor, " batch"]
    ) -> Float[Tensor, "layers batch"]:
        """Each layer's budget at the largest p that the total affords."""
        reached, total = readings.cumsum(-1), len(readings) * budgets

        def needed(p: Float[Tensor, " batch"]) -> Int[Tensor, "layers batch"]:
            return (reached < p[:, None]).sum(-1) + 1

        low, high = torch.zeros_like(budgets).double(), torch.ones_like(budgets).double()
        for _ in range(STEPS):
            middle = (low + high) / 2
            fits = needed(middle).sum(0) <= total
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return needed(low).double()
