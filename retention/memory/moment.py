"""Count, mean key and mean value of the evicted tokens of a head. Needs no training."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from retention.memory.base import Evicted, MemoryConfig, MemoryLayer, State
from retention.types import ModelShape


@dataclass
class Moment(MemoryConfig):
    """`Z = n exp(s q.kbar) (1 + s^2 q^T Sigma_kk q / 2)`, `N = n exp(s q.kbar) (vbar + s Sigma_vk q)`.

    A Taylor expansion of the evicted tokens' softmax around their mean key; same family as MomentKV
    (arXiv 2606.01563). `s` is the logits' scale.
    """

    name = "moment"

    covariance: str = "none"
    """none or full (both covariances)."""

    def __post_init__(self) -> None:
        if self.covariance not in ("none", "full"):
            raise ValueError(f"expected memory.covariance none or full, got {self.covariance!r}")

    def build(self, shape: ModelShape) -> "MomentLayer":
        """A layer without parameters."""
        return MomentLayer(self.covariance == "full", shape.num_kv_heads, shape.head_dim)


class MomentLayer(MemoryLayer):
    """Moments of one layer."""

    def __init__(self, covariance: bool, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.covariance, self.kv_heads, self.head_dim = covariance, kv_heads, head_dim

    def empty(self, batch: int, device: torch.device) -> State:
        """Zeros; a count of 0 is empty."""
        shape, width = (batch, self.kv_heads), self.head_dim
        sizes = {"count": shape, "keys": (*shape, width), "values": (*shape, width)}
        if self.covariance:
            sizes |= {"keys_keys": (*shape, width, width), "values_keys": (*shape, width, width)}
        return {name: torch.zeros(size, device=device) for name, size in sizes.items()}

    def absorb(self, state: State, evicted: Evicted) -> State:
        """Pairwise merge of counts, means and co-moments (Chan et al.)."""
        weight = evicted.mask.float()[..., None]
        keys, values = evicted.keys.float(), evicted.values.float()
        new = evicted.mask.sum(-1).float()
        old, total = state["count"], state["count"] + new
        each = 1 / new.clamp(min=1)[..., None]
        key_mean, value_mean = (keys * weight).sum(2) * each, (values * weight).sum(2) * each
        share = (new / total.clamp(min=1))[..., None]
        dk, dv = key_mean - state["keys"], value_mean - state["values"]
        fresh = {"count": total, "keys": state["keys"] + share * dk, "values": state["values"] + share * dv}
        if self.covariance:
            ck = (keys - key_mean[:, :, None]) * weight
            cv = (values - value_mean[:, :, None]) * weight
            between = (old * new / total.clamp(min=1))[..., None, None]
            for name, left, mean in (("keys_keys", ck, dk), ("values_keys", cv, dv)):
                inside = left.transpose(-1, -2) @ ck
                scatter = state[name] * old[..., None, None] + inside + between * mean[..., :, None] * dk[..., None, :]
                fresh[name] = scatter / total.clamp(min=1)[..., None, None]
        return fresh

    def estimate(
        self, state: State, query: Float[Tensor, "batch kv_heads queries head_dim"], scaling: float
    ) -> tuple[Float[Tensor, "batch kv_heads queries value_dim"], Float[Tensor, "batch kv_heads queries"]]:
        """The expansion, to first order in the values and second in the mass where covariances are kept."""
        lse = state["count"].log()[..., None] + scaling * (query @ state["keys"][..., None])[..., 0]
        values = state["values"][:, :, None].expand(*query.shape[:3], -1)
        if not self.covariance:
            return values, lse
        bracket = (1 + scaling**2 / 2 * ((query @ state["keys_keys"]) * query).sum(-1)).clamp(min=1e-6)
        values = (values + scaling * query @ state["values_keys"].transpose(-1, -2)) / bracket[..., None]
        return values, lse + bracket.log()
