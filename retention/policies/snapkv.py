"""SnapKV: what the last window of queries attends to stays (arXiv 2404.14469)."""

from dataclasses import dataclass

from retention.policies.window import WindowPolicy


@dataclass
class SnapKV(WindowPolicy):
    """`score = pool(mean over the last w queries of attention)`, group mean; the window itself stays.

    Query-aware only if the question lies inside the window. Differs from the paper: the window is kept inside
    the budget, and never takes more than half of it (the public code refuses budgets below the window).
    """
