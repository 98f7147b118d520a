"""CAKE: layers share the budget by how spread and how restless their attention is (arXiv 2503.12491)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.ops.scores import pool_apart
from retention.policies.base import Policy
from retention.policies.collect import MOMENT_ROWS, MOMENTS
from retention.types import KVState


@dataclass
class Cake(Policy):
    """`score = pool(mean + gamma * variance over the last w = 32 queries of attention)`, group mean; the window stays.

    Over the same rows and the keys in front of the window, `dispersion = -sum A log A` and `variance` (over rows,
    summed over heads and keys); a layer prefers `dispersion^(1 / tau1) * variance^(1 / tau2)` and is given
    `budget_l = w + (budget - w) * layers * preference_l / sum of preferences`.

    Differs from the paper: all layers are scored before any is evicted (the cascade of the public code evicts early
    layers again and again as later ones arrive, for a peak near the budget); the window is kept inside the budget,
    never more than half of it. tau is tuned per model and budget there, 1 here.
    """

    collector = "window_moments"
    allocator = "weighted"
    evicts_while_decoding = False

    gamma: float = 200.0
    """Weight of the variance in the score."""
    tau1: float = 1.0
    """Temperature of the dispersion; large is flat."""
    tau2: float = 1.0
    """Temperature of the variance."""
    kernel_size: int = 5
    """Average pooling along keys, odd; 1 switches it off."""

    def __post_init__(self) -> None:
        if not (self.tau1 > 0 and self.tau2 > 0):
            raise ValueError(f"expected cake.tau1 and cake.tau2 above 0, got {self.tau1} and {self.tau2}")
        if self.kernel_size % 2 != 1:
            raise ValueError(f"expected an odd cake.kernel_size, got {self.kernel_size}")

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Pooled mean and variance, fp32."""
        mean, variance, _ = (self.observed(kv, name) for name in MOMENTS)
        return pool_apart(mean + self.gamma * variance, kv.valid, ~self._before(kv), self.kernel_size)

    def layer_weight(self, kv: KVState) -> Float[Tensor, " batch"]:
        """The layer's preference."""
        before = self._before(kv)
        variance, entropy = (
            torch.where(before, self.observed(kv, name), 0.0).double().sum((1, 2)) for name in MOMENTS[1:]
        )
        return entropy ** (1 / self.tau1) * variance ** (1 / self.tau2)

    def layer_weights(
        self, readings: Float[Tensor, "layers batch"], budgets: Int[Tensor, " batch"]
    ) -> Float[Tensor, "layers batch"]:
        """The window for every layer, the rest by preference."""
        total = readings.sum(0)
        share = torch.where(total > 0, readings / total.clamp(min=1e-300), 1 / len(readings))
        window = (budgets // 2).clamp(max=MOMENT_ROWS)
        return window + (budgets - window) * len(readings) * share

    def _before(self, kv: KVState) -> Bool[Tensor, "batch kv_heads keys"]:
        """Entries in front of the window."""
        return kv.valid & (kv.seen[:, None, None] - kv.positions > MOMENT_ROWS)

    def recent(self, budget: int) -> int:
        """The window, at most half of the budget."""
        return min(MOMENT_ROWS, budget // 2)
