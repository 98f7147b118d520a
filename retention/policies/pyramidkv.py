"""PyramidKV: SnapKV's score under budgets that fall from layer to layer (arXiv 2406.02069)."""

from dataclasses import dataclass

from retention.policies.window import WindowPolicy


@dataclass
class PyramidKV(WindowPolicy):
    """`score = pool(mean over the last w queries of attention)`; `budget_l = w + hi - l (hi - lo) / (L - 1)`.

    With `b = budget - w`, `lo = b / beta` (`cache.pyramid_beta`, 20) and `hi = 2 b - lo`. Differs from the paper:
    budgets are rounded so that their total is exact (the public code floors both `lo` and the step between
    layers), and the window is kept inside the budget, never more than half of what a layer holds.
    """

    allocator = "pyramid"
