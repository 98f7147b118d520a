"""LagKV: entries that stand out against the partition behind their own stay (arXiv 2504.04704)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class LagKV(Policy):
    """Partitions of `lag_size` entries behind the sinks; partition p is measured against its reference p + 1.

    For x in {k, v}: `xbar = (x - min_ref) / (max_ref - min_ref)` per channel, `a_x = softmax over the partition of the
    standard deviation over channels of xbar`, `score = (a_k + a_v) / 2`, replaced by its rank in the partition, so that
    every partition keeps the same share. Sinks, the last whole partition and what follows it come first. Fewer entries
    than the sinks and two partitions: the sinks and the most recent. Reads no attention.

    Differs from the paper: partitions are cut anew from what each head holds at every eviction, where the public code
    scores a partition once, as soon as its reference is there (`cache.prefill_chunk` comes close); a channel that is
    constant in the reference counts as 0.
    """

    collector = "keys_values"

    lag_size: int = 128
    """Entries of a partition."""
    sinks: int = 4
    """First tokens, which come before everything else."""
    cross_scoring: bool = False
    """Scores themselves instead of their ranks, for `cache.allocator=head_adaptive`."""

    def __post_init__(self) -> None:
        if self.lag_size < 2:
            raise ValueError(f"expected lagkv.lag_size of at least 2, got {self.lag_size}")
        if self.sinks < 0:
            raise ValueError(f"expected lagkv.sinks of 0 or more, got {self.sinks}")

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Rank in the partition, in (0, 1]; where entries are too few, recency, in [0, 1)."""
        place, whole = self._places(kv)
        order = (~kv.valid).long().argsort(dim=-1, stable=True)
        recency = kv.positions / kv.seen[:, None, None].clamp(min=1)
        parts = (kv.valid.shape[-1] - self.sinks) // self.lag_size
        if parts < 2:
            return recency
        inside = order[..., self.sinks : self.sinks + parts * self.lag_size]
        spread = sum((self._spread(x.float(), inside, parts) for x in (kv.keys, kv.values)), torch.zeros(()))
        found = spread / 2
        if not self.cross_scoring:
            found = (found.argsort(-1).argsort(-1) + 1) / self.lag_size
        marked = recency.scatter(-1, inside[..., : -self.lag_size], found.flatten(2))
        scored = (place >= 0) & (place < (whole - 1) * self.lag_size) & (whole > 1)
        return torch.where(scored, marked, recency)

    def tiers(self, kv: KVState) -> Int[Tensor, "batch kv_heads keys"]:
        """Sinks, then the last partition and what follows it, then the rest."""
        place, whole = self._places(kv)
        last = (whole > 1) & (place >= (whole - 1) * self.lag_size)
        return 2 * (kv.valid & (kv.positions < self.sinks)).long() + (last & kv.valid).long()

    def _places(self, kv: KVState) -> tuple[Int[Tensor, "batch kv_heads keys"], Int[Tensor, "batch kv_heads 1"]]:
        """Place of each entry behind the head's sinks, and how many whole partitions there are."""
        place = kv.valid.long().cumsum(-1) - 1 - self.sinks
        whole = (kv.valid.sum(-1, keepdim=True) - self.sinks).clamp(min=0) // self.lag_size
        return torch.where(kv.valid, place, -1), whole

    def _spread(
        self, x: Float[Tensor, "batch kv_heads keys width"], inside: Int[Tensor, "batch kv_heads slots"], parts: int
    ) -> Float[Tensor, "batch kv_heads partitions lag"]:
        """a_x of all partitions but the last."""
        index = inside[..., None].expand(*inside.shape, x.shape[-1])
        cut = x.gather(2, index).unflatten(2, (parts, self.lag_size))
        low, high = cut.amin(3, keepdim=True)[:, :, 1:], cut.amax(3, keepdim=True)[:, :, 1:]
        wide: Bool[Tensor, "batch kv_heads partitions 1 width"] = high > low
        relative = torch.where(wide, (cut[:, :, :-1] - low) / (high - low).clamp(min=1e-20), 0.0)
        return relative.std(-1).softmax(-1)
