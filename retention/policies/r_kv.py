"""R-KV: heeded entries stay, and of keys that repeat each other only the newest (arXiv 2505.24133)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from retention.ops.scores import mean_row, peak_along_entries, redundancy
from retention.policies.base import Policy
from retention.policies.collect import WINDOW
from retention.types import KVState


@dataclass
class RKV(Policy):
    """`score = lam * attention - (1 - lam) * redundancy`; the last `window_size` entries stay. Made for decoding.

    - attention: of the last `window_size` queries, the largest logit of each head's query group, softmax over the
      entries in front of the window, mean over rows, max-pooled.
    - redundancy: cosine of keys, 0 on the diagonal; in each row the *latest* entry above `threshold` is set to 0, so
      that the newest copy is not punished; mean over rows, softmax over entries.

    The paper evicts every 128 decoded tokens: `cache.evict_every=128`. Rows of earlier tokens stay while decoding and
    follow their entries through evictions; an eviction without any observed token ranks by redundancy alone.

    Differs from the public code: a row without any similar entry changes nothing (there it clears the first entry),
    every sequence of a batch has its own similarities, and the window takes at most half of the budget.
    """

    collector = "window_peaks"

    window_size: int = 8
    """Query rows observed, and recent entries kept."""
    kernel_size: int = 7
    """Max-pooling along keys, odd; 1 switches it off."""
    lam: float = 0.07
    """Weight of attention against redundancy."""
    threshold: float = 0.5
    """Cosine above which a key counts as a copy."""

    def __post_init__(self) -> None:
        if not 1 <= self.window_size <= WINDOW:
            raise ValueError(f"expected rkv.window_size between 1 and {WINDOW}, got {self.window_size}")
        if self.kernel_size % 2 != 1:
            raise ValueError(f"expected an odd rkv.kernel_size, got {self.kernel_size}")
        if not 0 <= self.lam <= 1:
            raise ValueError(f"expected rkv.lam between 0 and 1, got {self.lam}")

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Attention against redundancy, fp32."""
        mean = redundancy(kv.keys, kv.valid, self.threshold)
        repeated = mean.masked_fill(~kv.valid, float("-inf")).softmax(-1).nan_to_num(0.0)
        return self.lam * self._attention(kv) - (1 - self.lam) * repeated

    def _attention(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        rows = kv.statistics.get("window_peaks")
        if rows is None:
            return torch.zeros(kv.valid.shape, device=kv.valid.device)
        before = kv.valid & (kv.seen[:, None, None] - kv.positions > self.window_size)
        rows = rows[:, :, -self.window_size :] * before[:, :, None]
        rows = rows / rows.sum(-1, keepdim=True).clamp(min=1e-20)
        return peak_along_entries(mean_row(rows), before, self.kernel_size)

    @property
    def observed_rows(self) -> int:
        """The window."""
        return self.window_size

    def recent(self, budget: int) -> int:
        """The window, at most half of the budget."""
        return min(self.window_size, budget // 2)
