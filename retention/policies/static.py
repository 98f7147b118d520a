"""What policies share that rank by the score of a trained gate, whatever a token's age."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from retention.ops.decay import score_from_log_beta
from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class StaticPolicy(Policy):
    """`score` = the gate's score; the newest entries stay, at most an eighth of the budget.

    Published budgets are far larger than published windows; the cap keeps that so at small budgets. Under
    `cache.selector=threshold` scores are compared with `cache.threshold` instead, and the budget is what comes out.
    """

    collector = "gate"

    recent_size: int = 0
    """Newest entries that stay, inside the budget."""

    def __post_init__(self) -> None:
        if self.recent_size < 0:
            raise ValueError(f"expected {self.gates_of}.recent_size of 0 or more, got {self.recent_size}")

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """As trained, fp32."""
        assert kv.log_beta is not None
        return score_from_log_beta(kv.log_beta)

    def recent(self, budget: int) -> int:
        """The window, at most an eighth of the budget."""
        return min(self.recent_size, budget // 8)
