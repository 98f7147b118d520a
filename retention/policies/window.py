"""What policies share that rank by the attention of the last queries: their window and their score."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from retention.ops.scores import window_score
from retention.policies.base import Policy
from retention.policies.collect import WINDOW
from retention.types import KVState


@dataclass
class WindowPolicy(Policy):
    """`score = pool(mean over the last w queries of attention)`, group mean; the window itself stays."""

    collector = "window_rows"
    evicts_while_decoding = False

    window_size: int = 32
    """Query rows observed, and recent entries kept."""
    kernel_size: int = 5
    """Average pooling along keys, odd; 1 switches it off."""

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        if not 1 <= self.window_size <= WINDOW:
            raise ValueError(f"expected {name}.window_size between 1 and {WINDOW}, got {self.window_size}")
        if self.kernel_size % 2 != 1:
            raise ValueError(f"expected an odd {name}.kernel_size, got {self.kernel_size}")

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Pooled mean of the observed rows; neighbours are neighbouring entries, padding and holes left out."""
        if "window_rows" not in kv.statistics:
            name = type(self).__name__
            raise ValueError(f"{name} decides right after a prompt, and none ran since the last eviction")
        return window_score(kv.statistics["window_rows"], kv.valid, self.window_size, self.kernel_size)

    @property
    def observed_rows(self) -> int:
        """The window."""
        return self.window_size

    def recent(self, budget: int) -> int:
        """The window, at most half of the budget."""
        return min(self.window_size, budget // 2)
