"""AdaKV: any score, by which the heads of a layer share its budget (arXiv 2407.11550)."""

from dataclasses import dataclass

from retention.policies.wrapper import Wrapper


@dataclass
class AdaKV(Wrapper):
    """Ranks as `base` does (SnapKV, as published); its scores are pooled over the heads of a layer.

    The safeguarded form: each head's best `floor(alpha * budget)` entries stay (`cache.head_floor`, 0.2), the rest
    of the layer's `heads * budget` go to the highest scores of all its heads. `cache.head_form=mix` pools without a
    floor and then moves every head's count by alpha towards the budget. The allocator alone is
    `cache.allocator=head_adaptive`. Differs from the paper: a window is kept inside the budget, never more than half
    of it on average.
    """

    collector = "window_rows"
    allocator = "head_adaptive"
    evicts_while_decoding = False
