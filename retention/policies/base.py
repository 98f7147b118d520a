"""The interface of every eviction policy: hyper-parameters and a score, nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from retention.policies.collect import Foresight, Repetition
from retention.types import KVState

StepRule = Callable[[KVState], Float[Tensor, "batch kv_heads keys"]]
"""Ranks entries after a decoded token: the lowest leaves, infinite may not."""


@dataclass
class Policy(ABC):
    """Ranks cached entries, higher = keep; holds hyper-parameters only.

    The class attributes are the method as published; `CacheConfig` may override allocator and selector, so
    that methods are compared with all factors equal but one.
    """

    collector: ClassVar[str] = "none"
    allocator: ClassVar[str] = "uniform"
    selector: ClassVar[str] = "head"
    gates_of: ClassVar[str | None] = None
    """Objective by which the gates were trained that the method ranks by; null where it needs no gates."""
    needs_evidence: ClassVar[bool] = False
    evicts_while_decoding: ClassVar[bool] = True
    evicts: ClassVar[bool] = True
    on_evict: ClassVar[str] = "drop"
    """drop, or merge evicted entries into kept ones."""
    first_share: ClassVar[float] = 1.0
    """Share of the budget that `score` chooses; the rest goes by `second_score`."""

    @abstractmethod
    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Rank entries; higher = keep. Invalid entries may hold any number, the selector removes them."""

    def tiers(self, kv: KVState) -> Int[Tensor, "batch kv_heads keys"] | None:
        """Lexicographic rank before the score; never a large additive constant."""
        return None

    def layer_weight(self, kv: KVState) -> Float[Tensor, "batch ..."] | None:
        """The layer's weight in the split of the budget over layers, for the allocators `weighted` and `modality`.

        Or what `layer_weights` needs of it; a reading by key is filled up with 0 where a layer holds fewer.
        """
        return None

    def layer_weights(
        self, readings: Float[Tensor, "layers batch ..."], budgets: Int[Tensor, " batch"]
    ) -> Float[Tensor, "layers batch"]:
        """The weights of all layers, from what `layer_weight` read off each and the average budget of a head."""
        return readings

    def visual_share(self, kv: KVState) -> Float[Tensor, "batch kv_heads"] | None:
        """Visual part of each head's budget, in [0, 1], for the allocator `modality`."""
        return None

    def second_score(
        self, kv: KVState, score: Float[Tensor, "batch kv_heads keys"]
    ) -> Float[Tensor, "batch kv_heads keys"] | None:
        """Another score for the rest of the budget once `score` has chosen its `first_share` of it."""
        return None

    def bind(self, table: Mapping[str, "Policy"], outer: tuple[str, ...] = ()) -> None:  # noqa: B027  (most build on none)
        """Told all presets with their settings, for a method that builds on another one; `outer` builds on this."""

    def without_value_norm(self) -> "Policy":
        """The same without a norm of values in its score, for who multiplies by one anyway."""
        return self

    @property
    def step_rule(self) -> StepRule | None:
        """The method's own rule for decoding, if it has one: a decoded token makes at most one entry of a head leave.

        The head may then hold its part of a prompt: its budget grows with every token by the share of the last prompt that
        the head kept.
        """
        return None

    @property
    def steps(self) -> bool:
        """Whether decoded tokens go by the method's own rule."""
        return self.step_rule is not None

    @property
    def weighs_layers(self) -> bool:
        """Whether `layer_weight` says anything."""
        return type(self).layer_weight is not Policy.layer_weight

    def second_pass(self) -> Repetition | Foresight | None:
        """What is fed behind a prompt before a decision about it, and never stays; most methods need nothing."""
        return None

    @property
    def needs_gates(self) -> bool:
        """Whether it ranks by trained gates."""
        return self.gates_of is not None

    @property
    def collectors(self) -> tuple[str, ...]:
        """Everything the method reads; more than `collector` where its settings ask for it."""
        return (self.collector,)

    @property
    def least(self) -> int:
        """Entries that every head keeps, however little `layer_weight` gives its layer."""
        return 0

    @property
    def redistributes(self) -> bool:
        """Whether what a full layer cannot take by its weight goes to the others; otherwise it is lost."""
        return True

    def observed(self, kv: KVState, name: str) -> Shaped[Tensor, "..."]:
        """A statistic that only a prompt brings.

        Raises:
            ValueError: when none ran since the last eviction.
        """
        if name not in kv.statistics:
            who = type(self).__name__
            raise ValueError(f"{who} decides right after a prompt, and none ran since the last eviction")
        return kv.statistics[name]

    @property
    def observed_rows(self) -> int:
        """Query rows the method reads, for the collector `window_rows`."""
        return 0

    def recent(self, budget: int) -> int:
        """How many of the newest entries the method always keeps inside a head's budget."""
        return 0
