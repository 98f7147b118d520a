"""CriticalKV: half of the budget by attention, the rest also by what a value does to the output (arXiv 2502.03805)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from retention.ops.scores import mean_row, pool_along_entries
from retention.policies.window import WindowPolicy
from retention.types import KVState

EPSILON = 1e-4


@dataclass
class CriticalKV(WindowPolicy):
    """First half of the budget by SnapKV's score, the rest by `(score + 1e-4) * ||W_O v||_1`; the window stays.

    `W_O` is the part of the output projection behind a query head; the norm is averaged over the group. With
    `cache.allocator=head_adaptive` budgets are AdaKV's and both stages follow per layer. Differs from the paper: the
    window is kept inside the budget, never more than half of it, and counts in the first half.
    """

    first_share = 0.5

    @property
    def collectors(self) -> tuple[str, ...]:
        """Window rows and the norms behind the output projection."""
        return (self.collector, "output_norm")

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Pooled mean of the rows that are no padding, which the constant is added to."""
        rows = self.observed(kv, "window_rows")[:, :, -self.window_size :]
        return pool_along_entries(mean_row(rows), kv.valid, self.kernel_size)

    def second_score(
        self, kv: KVState, score: Float[Tensor, "batch kv_heads keys"]
    ) -> Float[Tensor, "batch kv_heads keys"]:
        """Score times norm."""
        return (score + EPSILON) * self.observed(kv, "output_norm")
