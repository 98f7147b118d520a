"""MixKV: importance and diversity, mixed by how much a head's keys repeat each other (arXiv 2510.20707)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from retention.ops.scores import unit_range
from retention.policies.window import WindowPolicy
from retention.types import KVState


@dataclass
class MixKV(WindowPolicy):
    """`score = (1 - r) * importance + r * diversity`, per KV head; the window itself stays.

    With `snap`, the pooled mean over the last w queries of attention: importance is `snap + ||v||`, diversity is
    `-khat . mean of khat`; norm and diversity are brought to [0, 1] and scaled to the mean of `snap`. r is the mean
    cosine of two different keys, `(n^2 ||mean khat||^2 - n) / (n (n - 1))`.

    Differs from the paper: r is computed from the keys at hand, unless `table` holds what the public code reads from
    a file for one model family. With `cache.allocator=head_adaptive`, or as the base of `adakv`, it mixes AdaKV's
    score. The window is kept inside the budget.
    """

    table: list[list[float]] | None = None
    """r of every layer and KV head; null computes it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.table is not None and not all(-1 <= r <= 1 for row in self.table for r in row):
            raise ValueError("expected mixkv.table of cosines between -1 and 1, one row per layer, got others")

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """The mixture, fp32."""
        snap = super().score(kv) * kv.valid
        count = kv.valid.sum(-1, keepdim=True).clamp(min=1)
        unit = F.normalize(kv.keys.float(), dim=-1) * kv.valid[..., None]
        centre = unit.sum(2, keepdim=True) / count[..., None]
        alike = (count**2 * centre.square().sum(-1) - count) / (count * (count - 1)).clamp(min=1)
        if self.table is not None:
            alike = self._told(kv)
        level = snap.sum(-1, keepdim=True) / count

        def scaled(x: Float[Tensor, "batch kv_heads keys"]) -> Float[Tensor, "batch kv_heads keys"]:
            x = unit_range(x, kv.valid)
            return x * level * count / x.sum(-1, keepdim=True).clamp(min=1e-20)

        importance = snap + scaled(kv.values.float().norm(dim=-1))
        return (1 - alike) * importance + alike * scaled(-(unit * centre).sum(-1))

    def _told(self, kv: KVState) -> Float[Tensor, "kv_heads 1"]:
        """R of the layer's heads from the table."""
        assert self.table is not None
        row = self.table[kv.layer] if kv.layer < len(self.table) else []
        if len(row) != kv.valid.shape[1]:
            raise ValueError(
                f"expected mixkv.table to hold {kv.valid.shape[1]} numbers for layer {kv.layer}, got {len(row)}; write one "
                "row per layer with one cosine per KV head"
            )
        return torch.tensor(row, device=kv.valid.device)[:, None]
