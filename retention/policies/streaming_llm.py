"""StreamingLLM: attention sinks and the most recent tokens (arXiv 2309.17453)."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class StreamingLLM(Policy):
    """`score = position`, with the first `sinks` tokens in a higher tier.

    Differs from the paper: keys keep their original positions; the paper re-assigns positions inside the
    cache, which is `cache.positions=packed` here.
    """

    sinks: int = 4
    """First tokens that always stay."""

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Newer is better."""
        return kv.positions.float()

    def tiers(self, kv: KVState) -> Int[Tensor, "batch kv_heads keys"]:
        """Sinks before everything else."""
        return (kv.positions < self.sinks).long()
