"""SnapKV: what the last window of queries attends to stays (arXiv 2404.14469)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from retention.ops.scores import pool_along_entries
from retention.policies.base import Policy
from retention.policies.collect import WINDOW
from retention.types import KVState


@dataclass
class SnapKV(Policy):
    """`score = pool(mean over the last w queries of attention)`, group mean; the window itself stays.

    Query-aware only if the question lies inside the window. Differs from the paper: the window is kept inside
    the budget, and never takes more than half of it (the public code refuses budgets below the window).
    """

    collector = "window_rows"
    evicts_while_decoding = False

    window_size: int = 32
    """Query rows observed, and recent entries kept."""
    kernel_size: int = 5
    """Average pooling along keys, odd; 1 switches it off."""

    def __post_init__(self) -> None:
        if not 1 <= self.window_size <= WINDOW:
            raise ValueError(f"expected snapkv.window_size between 1 and {WINDOW}, got {self.window_size}")
        if self.kernel_size % 2 != 1:
            raise ValueError(f"expected an odd snapkv.kernel_size, got {self.kernel_size}")

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Pooled mean of the observed rows; neighbours are neighbouring entries, padding and holes left out."""
        if "window_rows" not in kv.statistics:
            raise ValueError("SnapKV decides right after a prompt, and none ran since the last eviction")
        mean = kv.statistics["window_rows"][:, :, -self.window_size :].mean(2)
        return pool_along_entries(mean, kv.valid, self.kernel_size)

    @property
    def observed_rows(self) -> int:
        """The window."""
        return self.window_size

    def recent(self, budget: int) -> int:
        """The window, at most half of the budget."""
        return min(self.window_size, budget // 2)
