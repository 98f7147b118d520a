"""KVzap: highest predicted log of a token's effect on the model (arXiv 2601.07891)."""

from dataclasses import dataclass

from retention.policies.static import StaticPolicy


@dataclass
class KVzap(StaticPolicy):
    """One pool of layers and heads; the newest 128 stay, at most an eighth of the budget.

    The paper evicts by threshold, -4 recommended: `cache.selector=threshold cache.threshold=-4`.
    """

    allocator = "global"
    selector = "global"
    gates_of = "kvzap"

    recent_size: int = 128
    """Newest entries that stay, inside the budget."""
