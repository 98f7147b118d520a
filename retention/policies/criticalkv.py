"""CriticalKV: half of the budget by any score, the rest also by what a value does to the output (arXiv 2502.03805)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from retention.policies.base import Policy
from retention.policies.wrapper import FOLLOWED, Wrapper
from retention.types import KVState

EPSILON = 1e-4


@dataclass
class CriticalKV(Wrapper):
    """First half of the budget by the score of `base` (SnapKV), the rest by `(score + 1e-4) * ||W_O v||_1`.

    `W_O` is the part of the output projection behind a query head; the norm is averaged over the group, and one in the
    base's own score is switched off. Counts are the base's; over `adakv`, or under `cache.allocator=head_adaptive`,
    heads are given theirs by the first score, and both stages follow in each.

    Differs from the paper: a window is kept inside the budget, never more than half of it, and counts in the first
    half; scores below 0 are first moved up, per head, to start at 0, because of two entries with the same negative
    score the product would prefer the one that matters less.
    """

    collector = "window_rows"
    evicts_while_decoding = False
    first_share = 0.5
    follows = (*(name for name in FOLLOWED if name != "first_share"), "allocator", "selector")

    @property
    def collectors(self) -> tuple[str, ...]:
        """What the base reads, and the norms behind the output projection."""
        return (*super().collectors, "output_norm")

    def _follow(self, inner: Policy) -> None:
        super()._follow(inner.without_value_norm())

    def second_score(
        self, kv: KVState, score: Float[Tensor, "batch kv_heads keys"]
    ) -> Float[Tensor, "batch kv_heads keys"]:
        """Score times norm."""
        lowest = torch.where(kv.valid, score, 0.0).amin(-1, keepdim=True)
        return (score - lowest.clamp(max=0) + EPSILON) * self.observed(kv, "output_norm")
