"""DuoAttention: some heads keep everything, the others sinks and recent tokens (arXiv 2410.10819)."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class DuoAttention(Policy):
    """Sinks and recent tokens of every head first, then whole heads by their share a, as far as one pool reaches.

    The budget thus chooses how many heads keep everything; the last of them keeps its newest tokens. Differs from
    the paper, which keeps 128 sinks and 256 recent tokens: fewer sinks, and what is left of the average budget of a
    head after them is recent at most by half, so that small budgets leave something for whole heads.
    """

    collector = "gate"
    allocator = "global"
    selector = "global"
    gates_of = "duo_attention"

    sinks: int = 4
    """First tokens that every head keeps."""
    recent_size: int = 256
    """Newest tokens that every head keeps."""

    def __post_init__(self) -> None:
        if min(self.sinks, self.recent_size) < 0:
            raise ValueError(
                f"expected duo_attention.sinks and recent_size of 0 or more, got {self.sinks} and {self.recent_size}"
            )

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Log of the head's share, fp32; entries of a head tie, and ties go to the newest."""
        assert kv.log_beta is not None
        return kv.log_beta.float()

    def tiers(self, kv: KVState) -> Int[Tensor, "batch kv_heads keys"]:
        """Sinks before everything else."""
        return (kv.positions < self.sinks).long()

    def recent(self, budget: int) -> int:
        """The recent tokens, at most half of what sinks leave of the budget."""
        return min(self.recent_size, max(budget - self.sinks, 0) // 2)
