"""What policies share that rank by the attention of the last queries: their window and their score."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from retention.ops.scores import mean_row, pool_apart
from retention.policies.base import Policy
from retention.policies.collect import WINDOW
from retention.types import KVState

POOLINGS = ("avg", "max")


@dataclass
class WindowPolicy(Policy):
    """`score = pool(mean over the last w queries of attention)`, group mean; the window itself stays."""

    collector = "window_rows"
    evicts_while_decoding = False

    window_size: int = 32
    """Query rows observed, and recent entries kept."""
    kernel_size: int = 5
    """Pooling along keys, odd; 1 switches it off. Entries of the window are pooled among themselves."""
    pooling: str = "avg"
    """avg or max."""

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        if not 1 <= self.window_size <= WINDOW:
            raise ValueError(f"expected {name}.window_size between 1 and {WINDOW}, got {self.window_size}")
        if self.kernel_size % 2 != 1:
            raise ValueError(f"expected an odd {name}.kernel_size, got {self.kernel_size}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"expected {name}.pooling {' or '.join(POOLINGS)}, got {self.pooling!r}")

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Pooled mean of the observed rows that are no padding; neighbours are neighbouring entries, holes left out."""
        received = mean_row(self.observed(kv, "window_rows")[:, :, -self.window_size :])
        window = kv.seen[:, None, None] - kv.positions <= self.window_size
        return pool_apart(received, kv.valid, window, self.kernel_size, largest=self.pooling == "max")

    @property
    def observed_rows(self) -> int:
        """The window."""
        return self.window_size

    def recent(self, budget: int) -> int:
        """The window, at most half of the budget."""
        return min(self.window_size, budget // 2)
