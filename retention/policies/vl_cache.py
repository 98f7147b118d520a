"""VL-Cache: what text behind the images attends to stays, and sparse layers hold less (arXiv 2410.23317)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from retention.ops.scores import mean_over_heads
from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class VLCache(Policy):
    """`score = attention received from text behind vision`; a layer's budget is in proportion to 1 - its sparsity.

    Sparsity is the share of the visible entries of these rows that are below 1 % of the largest in their row. The
    newest tenth of the budget stays. All heads of a layer keep the same entries, unless `per_head`.

    No official code is known. Differs from what is described: where no text follows the last image the 32 newest
    tokens stand in, rows add up over chunks and turns, and the recent tenth is kept inside the budget.
    """

    collector = "text_rows"
    allocator = "weighted"

    recent_share: float = 0.1
    """Share of the budget for the newest entries."""
    per_head: bool = False
    """Each head ranks by itself; false is one ranking per layer."""

    def __post_init__(self) -> None:
        if not 0 <= self.recent_share < 1:
            raise ValueError(f"expected vlcache.recent_share in [0, 1), got {self.recent_share}")

    @property
    def collectors(self) -> tuple[str, ...]:
        """Sums over the text rows, and how dense they are."""
        return (self.collector, "text_density")

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Column sums over the text rows, fp32."""
        received = kv.statistics["text_sums"]
        return received if self.per_head else mean_over_heads(received, kv.positions, kv.valid)

    def layer_weight(self, kv: KVState) -> Float[Tensor, " batch"]:
        """The density of the layer's attention."""
        dense, seen = (
            torch.where(kv.valid, kv.statistics[name], 0.0).double().sum((1, 2)) for name in ("text_dense", "text_seen")
        )
        return dense / seen.clamp(min=1)

    def recent(self, budget: int) -> int:
        """The recent share of the budget."""
        return int(self.recent_share * budget)
