"""H2O: heavy hitters of accumulated attention and the recent half stay (arXiv 2306.14048)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class H2O(Policy):
    """`score = attention received, summed over all queries so far`, group mean; half of the budget is recent.

    Differs from the paper by default: the sum is divided by the number of queries that could see the key
    (`normalise: visible`), because raw sums favour early tokens; `raw` is the published form. Batched.
    """

    collector = "column_sums"

    normalise: str = "visible"
    """visible (per query that could see the key) or raw (as published)."""
    recent_share: float = 0.5
    """Share of the budget for the newest entries."""

    def __post_init__(self) -> None:
        if self.normalise not in ("visible", "raw"):
            raise ValueError(f"expected h2o.normalise 'visible' or 'raw', got {self.normalise!r}")
        if not 0 <= self.recent_share < 1:
            raise ValueError(f"expected h2o.recent_share in [0, 1), got {self.recent_share}")

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Accumulated attention, fp32."""
        received = kv.statistics["column_sums"]
        if self.normalise == "raw":
            return received
        return received / (kv.seen[:, None, None] - kv.positions).clamp(min=1)

    def recent(self, budget: int) -> int:
        """The recent share of the budget."""
        return int(self.recent_share * budget)
