"""DBTrimKV: learned retention gates, all layers and heads compete for one pool (arXiv 2605.09649)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from retention.ops.decay import log_alpha
from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class DBTrimKV(Policy):
    """`score = log_alpha = (seen - position) * log_beta`, ranked in one pool of layers x heads x budget."""

    collector = "gate"
    allocator = "global"
    selector = "global"
    gates_of = "distillation"

    lookahead: int = 1
    """Queries to come over which retention is summed (a reconstruction)."""
    age_offset: int = 0
    """Added to every age; 1 is the convention of the public code."""

    def __post_init__(self) -> None:
        if self.lookahead < 1 or self.age_offset < 0:
            raise ValueError(
                f"expected lookahead of at least 1 and age_offset of 0 or more, got {self.lookahead} and {self.age_offset}"
            )

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Log retention at the next query, or summed over the next `lookahead`, fp32."""
        assert kv.log_beta is not None
        how = {"lookahead": self.lookahead, "age_offset": self.age_offset}
        return log_alpha(kv.log_beta, kv.positions, kv.seen, **how)
