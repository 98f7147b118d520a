"""What policies share that rank by how much of a token a trained gate retains by now."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from retention.ops.decay import log_alpha
from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class DecayingPolicy(Policy):
    """`score = log_alpha = (seen - position) * log_beta`, for gates of either architecture."""

    collector = "gate"
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
