"""MEDA: layers whose attention between vision and text is spread hold more, the rest is merged (arXiv 2502.17599)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class Meda(Policy):
    """`score = attention received, summed over all queries so far`, text first; half of the budget is recent.

    A layer's share of the budget is the softmax over layers of `E = mean over heads of (H(A_TV) / N_T + H(A_VT) / N_V)`:
    the entropy of rows of one modality, softmax over the keys of the other alone, averaged over these rows. What leaves
    is merged into the kept entry with the most similar key (`cache.merge`).

    The form of the paper; the public code takes the entropy of the whole map. Differs from the paper: text is a tier
    inside the budget, not an addition to it (`cache.protect_text` insists on it); after an eviction entropies are of
    what stayed.
    """

    collector = "column_sums"
    allocator = "weighted"
    on_evict = "merge"

    recent_share: float = 0.5
    """Share of the budget for the newest entries."""

    def __post_init__(self) -> None:
        if not 0 <= self.recent_share < 1:
            raise ValueError(f"expected meda.recent_share in [0, 1), got {self.recent_share}")

    @property
    def collectors(self) -> tuple[str, ...]:
        """Column sums, and entropies across modalities."""
        return (self.collector, "modality_entropy")

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Accumulated attention, fp32."""
        return kv.statistics["column_sums"]

    def tiers(self, kv: KVState) -> Int[Tensor, "batch kv_heads keys"]:
        """Text before images."""
        return (~kv.visual).long()

    def layer_weight(self, kv: KVState) -> Float[Tensor, " batch"]:
        """E, in nats."""
        received, total = kv.statistics["modality_entropy"].double(), torch.zeros(())
        vision, text = kv.visual & kv.valid, ~kv.visual & kv.valid
        for heard, rows in ((vision, text), (text, vision)):
            total = total + torch.where(heard, received, 0.0).sum(-1) / rows.sum(-1).clamp(min=1)
        return total.mean(-1)

    def layer_weights(
        self, readings: Float[Tensor, "layers batch"], budgets: Int[Tensor, " batch"]
    ) -> Float[Tensor, "layers batch"]:
        """Softmax over layers."""
        return readings.softmax(0)

    def recent(self, budget: int) -> int:
        """The recent share of the budget."""
        return int(self.recent_share * budget)
