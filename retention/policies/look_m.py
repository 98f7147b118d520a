"""LOOK-M: text before images, heavy hitters and recent entries, the rest merged into them (arXiv 2406.18139)."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class LookM(Policy):
    """`score = attention received, summed over all queries so far`, group mean; no image entry stays before a text entry.

    The recent share comes first; what leaves is merged into the kept entry with the most similar key
    (`cache.merge`, pivot by default; `cache.on_evict=drop` for the variant that drops).

    Differs from the paper: text is a tier and not a constant added to its scores, and text beyond the budget is
    evicted too (the public code keeps every text token, so that its caches exceed the budget; `cache.protect_text`
    keeps it inside the budget); images are found by their tokens and not by a fixed length.
    """

    collector = "column_sums"
    on_evict = "merge"

    recent_share: float = 0.5
    """Share of the budget for the newest entries."""

    def __post_init__(self) -> None:
        if not 0 <= self.recent_share < 1:
            raise ValueError(f"expected lookm.recent_share in [0, 1), got {self.recent_share}")

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Accumulated attention, fp32."""
        return kv.statistics["column_sums"]

    def tiers(self, kv: KVState) -> Int[Tensor, "batch kv_heads keys"]:
        """Text before images."""
        return (~kv.visual).long()

    def recent(self, budget: int) -> int:
        """The recent share of the budget."""
        return int(self.recent_share * budget)
