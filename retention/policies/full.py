"""No eviction: the reference every other policy is compared with."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class Full(Policy):
    """Keeps everything, whatever the budget."""

    evicts = False

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Position: never used to evict."""
        return kv.positions.float()
