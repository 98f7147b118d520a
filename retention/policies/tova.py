"""TOVA: what the newest query attends to stays (arXiv 2401.06104)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from retention.ops.scores import mean_over_heads
from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class TOVA(Policy):
    """`score = attention of the last query`, mean over all heads, so that a layer's heads keep the same entries.

    Differs from the paper: the newest entry always stays.
    """

    collector = "window_rows"

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """The last row, fp32."""
        if "window_rows" not in kv.statistics:
            raise ValueError(
                "TOVA reads the attention of the newest query, and none was observed since the last eviction"
            )
        return mean_over_heads(kv.statistics["window_rows"][:, :, -1], kv.positions, kv.valid)

    @property
    def observed_rows(self) -> int:
        """The last query alone."""
        return 1

    def recent(self, budget: int) -> int:
        """The newest entry."""
        return min(1, budget)
