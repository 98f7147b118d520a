"""Count, mean key and mean value of the evicted tokens of a head. Needs no training."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from retention.memory.base import Evicted, MemoryConfig, MemoryLayer, State
from retention.types import ModelShape

COVARIANCES = ("none", "vk", "diag", "full")


@dataclass
class Moment(MemoryConfig):
    """`Z = n exp(s q.kbar) (1 + s^2 q^T Sigma_kk q / 2)`, `N = n exp(s q.kbar) (vbar + s Sigma_vk q)`.

    A Taylor expansion of the evicted tokens' softmax around their mean key; same family as MomentKV
    (arXiv 2606.01563). `s` is the logits' scale.
    """

    name = "moment"

    covariance: str = "none"
    """none, vk (of values with keys; the bracket of Z stays 1), diag (that, and the variances of keys) or full (both)."""

    def __post_init__(self) -> None:
        if self.covariance not in COVARIANCES:
            raise ValueError(f"expected memory.covariance among {', '.join(COVARIANCES)}, got {self.covariance!r}")

    def build(self, shape: ModelShape) -> "MomentLayer":
        """A layer without parameters."""
        return MomentLayer(self.covariance, shape.num_kv_heads, shape.head_dim)


class MomentLayer(MemoryLayer):
    """Moments of one layer."""

    def __init__(self, covariance: str, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.covariance, self.kv_heads, self.head_dim = covariance, kv_heads, head_dim

    def empty(self, batch: int, device: torch.device) -> State:
        """Zeros; a count of 0 is empty."""
        shape, width = (batch, self.kv_heads), self.head_dim
        sizes = {"count": shape, "keys": (*shape, width), "values": (*shape, width)}
        if self.covariance != "none":
            sizes["values_keys"] = (*shape, width, width)
        if self.covariance in ("diag", "full"):
            sizes["keys_keys"] = (*shape, width) if self.covariance == "diag" else (*shape, width, width)
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
        ck = (keys - key_mean[:, :, None]) * weight
        cv = (values - value_mean[:, :, None]) * weight
        for name, left, mean in (("keys_keys", ck, dk), ("values_keys", cv, dv)):
            if name not in state:
                continue
            if state[name].dim() == 3:
                inside, between = left.square().sum(2), mean.square()
            else:
                inside, between = left.transpose(-1, -2) @ ck, mean[..., :, None] * dk[..., None, :]
            counts = (x.view(*x.shape, *[1] * (inside.dim() - 2)) for x in (old, new, total.clamp(min=1)))
            before, added, after = counts
            fresh[name] = (state[name] * before + inside + before * added / after * between) / after
        return fresh

    def estimate(
        self, state: State, query: Float[Tensor, "batch kv_heads queries head_dim"], scaling: float
    ) -> tuple[Float[Tensor, "batch kv_heads queries value_dim"], Float[Tensor, "batch kv_heads queries"]]:
        """The expansion, to first order in the values and second in the mass where covariances are kept."""
        lse = state["count"].log()[..., None] + scaling * (query @ state["keys"][..., None])[..., 0]
        values = state["values"][:, :, None].expand(*query.shape[:3], -1)
        if "values_keys" in state:
            values = values + scaling * query @ state["values_keys"].transpose(-1, -2)
        if "keys_keys" not in state:
            return values, lse
        spread = state["keys_keys"]
        turned = query * spread[:, :, None] if spread.dim() == 3 else query @ spread
        bracket = (1 + scaling**2 / 2 * (turned * query).sum(-1)).clamp(min=1e-6)
        return values / bracket[..., None], lse + bracket.log()
