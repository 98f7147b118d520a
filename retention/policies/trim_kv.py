"""TRIM-KV: learned retention gates, each head keeps its best (arXiv 2512.03324)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from retention.ops.decay import log_alpha
from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class TrimKV(Policy):
    """`score = log_alpha = (seen - position) * log_beta`, per KV head.

    `log_beta` comes from trained gates of either architecture; per-head eviction is what names this policy.
    """

    collector = "gate"
    gates_of = "distillation"

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Log retention at the next query, fp32."""
        assert kv.log_beta is not None
        return log_alpha(kv.log_beta, kv.positions, kv.seen)
