"""Key-norm eviction: keys of small L2 norm stay (arXiv 2406.11430)."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from retention.policies.base import Policy
from retention.types import KVState

SKIPPED = 1e9


@dataclass
class Knorm(Policy):
    """`score = -||k||`; RoPE does not change the norm.

    Differs from the paper: no layer is exempt, so that budgets are equal; the public code leaves layers 0 and 1
    uncompressed, which is `skip_layers=[0,1]` here: the other layers pay for them, and the total stays exact. Models
    that normalise keys carry little signal in the norm.
    """

    collector = "keys_values"

    skip_layers: list[int] = field(default_factory=list)
    """Layers that keep everything as far as the total reaches, counted among those that can be evicted."""

    def __post_init__(self) -> None:
        if any(layer < 0 for layer in self.skip_layers):
            raise ValueError(f"expected knorm.skip_layers of 0 or more, got {self.skip_layers}")
        if self.skip_layers:
            vars(self)["allocator"] = "weighted"

    @property
    def least(self) -> int:
        """One entry in layers that pay for others."""
        return 1 if self.skip_layers else 0

    @property
    def weighs_layers(self) -> bool:
        """Where some are skipped."""
        return bool(self.skip_layers)

    def layer_weight(self, kv: KVState) -> Float[Tensor, " batch"] | None:
        """So much for layers that are skipped that all they can hold is theirs."""
        if not self.skip_layers:
            return None
        return torch.full(kv.seen.shape, SKIPPED if kv.layer in self.skip_layers else 1.0, device=kv.seen.device)

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Negative norm of each key, fp32."""
        return -kv.keys.float().norm(dim=-1)
