"""DBTrimKV: learned retention gates, all layers and heads compete for one pool (arXiv 2605.09649)."""

from dataclasses import dataclass

from retention.policies.decaying import DecayingPolicy


@dataclass
class DBTrimKV(DecayingPolicy):
    """Log retention, ranked in one pool of layers x heads x budget."""

    allocator = "global"
    selector = "global"
