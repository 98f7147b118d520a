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

    @abstractmethod
    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Rank entries; higher = keep. Invalid entries may hold any number, the selector removes them."""

    def tiers(self, kv: KVState) -> Int[Tensor, "batch kv_heads keys"] | None:
        """Lexicographic rank before the score; never a large additive constant."""
        return None

    @property
    def observed_rows(self) -> int:
        """Query rows the method reads, for the collector `window_rows`."""
        return 0

    def recent(self, budget: int) -> int:
        """How many of the newest entries the method always keeps inside a head's budget."""
        return 0
