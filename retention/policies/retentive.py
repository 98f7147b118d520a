"""RetentiveKV's retention score: attention mixed with how widely it is spread (arXiv 2605.04075)."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from retention.ops.entropy import ENTROPIES, OBSERVERS, observed_by, observers_of, retention_score
from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class Retentive(Policy):
    """`score = lam * a + (1 - lam) * h`; the first `sinks` and the newest `window_size` entries stay.

    `a` is the attention received from text behind the last image (the newest 32 such queries; any kind of query where
    fewer than two are there), scaled to [0, 1] per head, `h` the entropy of the same attention (`ops.entropy`). What
    leaves flows into the cache's memory where it has one, and is dropped where it has none; `cache.on_evict=memory`
    insists on one.

    A reconstruction: no code is public, and lam, the window and the paper's entropy over more than one query are not
    known. The paper's own `-p log p` is `entropy: pointwise`, which for one query ranks like attention.
    """

    collector = "observers"
    on_evict = "memory"

    lam: float = 0.5
    """Weight of attention against entropy."""
    entropy: str = "across_queries"
    """across_queries, across_heads or pointwise."""
    sinks: int = 4
    """First tokens that always stay."""
    window_size: int = 32
    """Newest entries that stay, at most half of the budget."""

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise ValueError(f"expected retentive.lam in [0, 1], got {self.lam}")
        if self.entropy not in ENTROPIES:
            raise ValueError(f"expected retentive.entropy among {', '.join(ENTROPIES)}, got {self.entropy!r}")
        if min(self.sinks, self.window_size) < 0:
            raise ValueError(
                f"expected retentive.sinks and retentive.window_size of 0 or more, got {self.sinks} and {self.window_size}"
            )

    @property
    def collectors(self) -> tuple[str, ...]:
        """Rows of the observing queries, query heads apart where they are compared."""
        return (observers_of(self.entropy),)

    @property
    def observed_rows(self) -> int:
        """As many as are read."""
        return OBSERVERS

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """R, in [0, 1]."""
        rows = self.observed(kv, observers_of(self.entropy))
        return retention_score(*observed_by(rows, kv.visual, kv.valid, self.entropy), self.lam)

    def tiers(self, kv: KVState) -> Int[Tensor, "batch kv_heads keys"]:
        """The first tokens before everything else."""
        return (kv.positions < self.sinks).long()

    def recent(self, budget: int) -> int:
        """The window, at most half of the budget."""
        return min(self.window_size, budget // 2)
