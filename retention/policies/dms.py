"""DMS: entries whose eviction was decided leave once they are old enough (arXiv 2506.05345)."""

from dataclasses import dataclass

from retention.policies.static import StaticPolicy


@dataclass
class DMS(StaticPolicy):
    """The least decided go first, from one pool; the newest 512 stay, at most an eighth of the budget.

    The paper's budget is what its decisions leave: `cache.selector=threshold cache.threshold=0`.
    """

    allocator = "global"
    selector = "global"
    gates_of = "dms"

    recent_size: int = 512
    """Newest entries that stay, inside the budget."""
