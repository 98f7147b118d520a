"""Evidence oracle: tokens that answer the questions, then the most recent ones; no method, a reference."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class Oracle(Policy):
    """`score = position`, with the evidence in a higher tier: what perfect knowledge of the questions keeps.

    `EvictingCache.mark_evidence` names the evidence; without any, the most recent tokens stay. No upper bound: layers
    and heads may need different tokens, and a model may have moved what it read to tokens behind the evidence.
    (An oracle that ranks by the attention of the answers themselves is not there.)
    """

    needs_evidence = True

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Newer is better."""
        return kv.positions.float()

    def tiers(self, kv: KVState) -> Int[Tensor, "batch kv_heads keys"]:
        """Evidence before everything else."""
        return torch.zeros_like(kv.positions) if kv.evidence is None else kv.evidence.long()
