"""MadaKV-style: budgets of their own for vision and text in every head, as proxy tokens heed them (arXiv 2506.15724)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retention.ops.scores import covering_count
from retention.policies.base import Policy
from retention.policies.collect import WINDOW
from retention.types import KVState


@dataclass
class Mada(Policy):
    """`psi(j) = sum over the proxies r of A[r, j]`, group mean; proxies are the newest `proxies` tokens.

    - Modality preference: with `w_m = sum of psi over modality m`, a head gives the share `w_V / (w_V + w_T)` of its
      budget to vision and the rest to text, and keeps the best of each by psi.
    - Hierarchical compensation: `need_m` is the size of the smallest set that covers `theta * w_m`; layers share the
      budget in proportion to the mean over heads of `need_V + need_T`, so that what one layer spares another gets.

    A reconstruction from descriptions of the method; no code is public. The number of proxies and theta are not
    published. The paper carries a layer's surplus to the next one, summed over heads though budgets are per head;
    here the needs of all layers are known before any is evicted and are rescaled, per head, to the exact total. The
    smallest budget of a head is what `cache.sink_size` and `cache.recent_size` protect.

    While decoding (`cache.evict_every`) the proxies are the newest tokens, decoded ones included: their rows stay
    beside the prompt's until there are `proxies` newer ones, and follow their entries through evictions. An eviction
    that is asked for when no token was observed knows no preference: modalities share by what is there, newest first.
    """

    collector = "window_rows"
    allocator = "modality"

    proxies: int = 16
    """Newest tokens whose attention decides."""
    theta: float = 0.9
    """Part of a modality's attention that its entries should cover."""
    preference: bool = True
    """Heads split their budget between modalities by what they heed; false splits it by what is there."""
    compensate: bool = True
    """Layers share the budget by what they need; false gives all the same."""

    def __post_init__(self) -> None:
        if not 1 <= self.proxies <= WINDOW:
            raise ValueError(f"expected mada.proxies between 1 and {WINDOW}, got {self.proxies}")
        if not 0 < self.theta <= 1:
            raise ValueError(f"expected mada.theta above 0 and at most 1, got {self.theta}")

    @property
    def observed_rows(self) -> int:
        """The proxies."""
        return self.proxies

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """psi, fp32; 0 at padding and holes."""
        rows = kv.statistics.get("window_rows")
        return (
            torch.zeros(kv.valid.shape, device=kv.valid.device)
            if rows is None
            else rows[:, :, -self.proxies :].sum(2) * kv.valid
        )

    def visual_share(self, kv: KVState) -> Float[Tensor, "batch kv_heads"]:
        """w_V / (w_V + w_T); what is there decides where nothing was heeded, or without preference."""
        heeded, there = self.score(kv), kv.valid.float()
        heeded = torch.where((heeded > 0).any(-1, keepdim=True) & self.preference, heeded, there)
        vision, text = (torch.where(kind, heeded, 0.0).double().sum(-1) for kind in self._kinds(kv))
        return vision / (vision + text).clamp(min=1e-300)

    def layer_weight(self, kv: KVState) -> Float[Tensor, " batch"]:
        """Mean over heads of the entries that both modalities need."""
        heeded = self.score(kv)
        needs = sum((covering_count(heeded, kind, self.theta) for kind in self._kinds(kv)), torch.zeros(()))
        weight = needs.double().mean(-1)
        return weight if self.compensate else torch.ones_like(weight)

    def _kinds(self, kv: KVState) -> tuple[Bool[Tensor, "batch kv_heads keys"], Bool[Tensor, "batch kv_heads keys"]]:
        return kv.visual & kv.valid, ~kv.visual & kv.valid
