"""Which threshold keeps a budget: measured on validation contexts, stored with the gates."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

SHARES = tuple(0.00625 * 2**k for k in range(8))
"""Kept shares of the context at which a curve is measured, 0.625% to 80%."""


@dataclass
class Calibration:
    """Budgets in entries per head against the smallest score that a pool of that many entries holds."""

    budgets: list[float]
    thresholds: list[float]
    seen: float
    """Mean tokens of the contexts it was measured on."""

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Calibration":
        """The curve of an artefact's training record.

        Raises:
            ValueError: when it has none.
        """
        if "calibration" not in record:
            raise ValueError(
                "selector=threshold without cache.threshold needs gates with a calibration curve, these carry none; give "
                "cache.threshold, or train and export gates with this version"
            )
        return cls(**record["calibration"])

    def at(self, budgets: Shaped[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Thresholds for budgets in entries per head, linear in their logarithm; the nearest end outside the curve."""
        given, thresholds = (torch.tensor(x, device=budgets.device) for x in (self.budgets, self.thresholds))
        known, wanted = given.log(), budgets.float().log().clamp(given[0].log(), given[-1].log())
        right = torch.searchsorted(known, wanted).clamp(1, len(known) - 1)
        share = (wanted - known[right - 1]) / (known[right] - known[right - 1])
        return thresholds[right - 1] + share * (thresholds[right] - thresholds[right - 1])


def pool_threshold(
    scores: Float[Tensor, "layers batch kv_heads keys"], valid: Bool[Tensor, "layers batch kv_heads keys"], share: float
) -> float:
    """The smallest of the best `share` of all valid scores: keeping what reaches it keeps that share on average."""
    pool = scores[valid]
    return float(pool.topk(max(1, round(share * len(pool)))).values[-1])
