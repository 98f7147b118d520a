"""The interface of every eviction policy: hyper-parameters and a score, nothing else."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from retention.types import KVState


@dataclass
class Policy(ABC):
    """Ranks cached entries, higher = keep; holds hyper-parameters only.

    The class attributes are the method as published; `CacheConfig` may override allocator and selector, so
    that methods are compared with all factors equal but one.
    """

    collector: ClassVar[str] = "none"
    allocator: ClassVar[str] = "uniform"
    selector: ClassVar[str] = "head"
    needs_gates: ClassVar[bool] = False
    evicts_while_decoding: ClassVar[bool] = True
    evicts: ClassVar[bool] = True
    first_share: ClassVar[float] = 1.0
    """Share of the budget that `score` chooses; the rest goes by `second_score`."""

    @abstractmethod
    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Rank entries; higher = keep. Invalid entries may hold any number, the selector removes them."""

    def tiers(self, kv: KVState) -> Int[Tensor, "batch kv_heads keys"] | None:
        """Lexicographic rank before the score; never a large additive constant."""
        return None

    def layer_weight(self, kv: KVState) -> Float[Tensor, " batch"] | None:
        """The layer's weight in the split of the budget over layers, for the allocators `weighted` and `modality`."""
        return None

    def visual_share(self, kv: KVState) -> Float[Tensor, "batch kv_heads"] | None:
        """Visual part of each head's budget, in [0, 1], for the allocator `modality`."""
        return None

    def second_score(
        self, kv: KVState, score: Float[Tensor, "batch kv_heads keys"]
    ) -> Float[Tensor, "batch kv_heads keys"] | None:
        """Another score for the rest of the budget once `score` has chosen its `first_share` of it."""
        return None

    @property
    def observed_rows(self) -> int:
        """Query rows the method reads, for the collector `window_rows`."""
        return 0

    def recent(self, budget: int) -> int:
        """How many of the newest entries the method always keeps inside a head's budget."""
        return 0
