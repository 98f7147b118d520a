"""AdaKV: SnapKV's score, by which the heads of a layer share its budget (arXiv 2407.11550)."""

from dataclasses import dataclass

from retention.policies.window import WindowPolicy


@dataclass
class AdaKV(WindowPolicy):
    """`score = pool(mean over the last w queries of attention)`, pooled over the heads of a layer.

    The safeguarded form: each head's best `floor(alpha * budget)` entries stay (`cache.head_floor`, 0.2), the rest
    of the layer's `heads * budget` go to the highest scores of all its heads. Any other policy gets the same by
    `cache.allocator=head_adaptive`. Differs from the paper: the window is kept inside the budget, never more than
    half of it on average.
    """

    allocator = "head_adaptive"
