"""Key-norm eviction: keys of small L2 norm stay (arXiv 2406.11430)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class Knorm(Policy):
    """`score = -||k||`; RoPE does not change the norm.

    Differs from the paper: no layer is exempt, so that budgets are equal (the public code leaves layers 0
    and 1 uncompressed). Models that normalise keys carry little signal in the norm.
    """

    collector = "keys_values"

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Negative norm of each key, fp32."""
        return -kv.keys.float().norm(dim=-1)
