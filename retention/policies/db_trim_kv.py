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

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Log retention at the next query, fp32."""
        assert kv.log_beta is not None
        return log_alpha(kv.log_beta, kv.positions, kv.seen)
