"""What policies share that change one factor of another one: the rest is that policy's."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from retention.policies.base import Policy, StepRule
from retention.policies.collect import Foresight, Repetition
from retention.types import KVState

Kind = TypeVar("Kind")
KNOWN: dict[str, type[Policy]] = {}
"""The registry, filled in by the package: methods do not import each other."""
FOLLOWED = ("collector", "gates_of", "needs_evidence", "evicts_while_decoding", "on_evict", "first_share")


@dataclass
class Wrapper(Policy):
    """Another policy, named by `base`, in all but what a subclass changes.

    Its settings are those of its own preset where a table of presets is at hand (an evaluation), else its defaults;
    `over` takes a policy as it is.
    """

    follows: ClassVar[tuple[str, ...]] = FOLLOWED
    """Class attributes that are the base's."""

    base: str = "snapkv"
    """Name of the policy that is wrapped."""

    def __post_init__(self) -> None:
        self._follow(self._named(KNOWN)())

    def over(self, policy: Policy) -> "Wrapper":
        """The same around that policy."""
        twin = replace(self)
        twin._follow(policy)
        return twin

    def bind(self, table: Mapping[str, Policy], outer: tuple[str, ...] = ()) -> None:
        """Take the base, with its settings, from a table of presets.

        Raises:
            ValueError: when the base is not in the table, keeps everything, or is built on this one.
        """
        if self.base in outer:
            raise ValueError(
                f"expected policies built on another one, got a circle of {', '.join(outer)}; change a base"
            )
        inner = self._named(table)
        inner.bind(table, (*outer, self.base))
        self._follow(inner)

    def _named(self, table: Mapping[str, Kind]) -> Kind:
        if self.base not in table:
            who = type(self).__name__.lower()
            raise ValueError(f"expected {who}.base among {', '.join(table)}, got {self.base!r}")
        return table[self.base]

    def _follow(self, inner: Policy) -> None:
        if not inner.evicts:
            who = type(self).__name__.lower()
            raise ValueError(f"expected a {who}.base that evicts, got {self.base!r}; name a policy that ranks entries")
        vars(self).update({name: getattr(inner, name) for name in self.follows}, _inner=inner)

    @property
    def inner(self) -> Policy:
        """The policy that is wrapped."""
        return vars(self)["_inner"]

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """The base's."""
        return self.inner.score(kv)

    def tiers(self, kv: KVState) -> Int[Tensor, "batch kv_heads keys"] | None:
        """The base's."""
        return self.inner.tiers(kv)

    def layer_weight(self, kv: KVState) -> Float[Tensor, "batch ..."] | None:
        """The base's."""
        return self.inner.layer_weight(kv)

    def layer_weights(
        self, readings: Float[Tensor, "layers batch ..."], budgets: Int[Tensor, " batch"]
    ) -> Float[Tensor, "layers batch"]:
        """The base's."""
        return self.inner.layer_weights(readings, budgets)

    def visual_share(self, kv: KVState) -> Float[Tensor, "batch kv_heads"] | None:
        """The base's."""
        return self.inner.visual_share(kv)

    def second_score(
        self, kv: KVState, score: Float[Tensor, "batch kv_heads keys"]
    ) -> Float[Tensor, "batch kv_heads keys"] | None:
        """The base's."""
        return self.inner.second_score(kv, score)

    def second_pass(self) -> Repetition | Foresight | None:
        """What the base needs fed."""
        return self.inner.second_pass()

    @property
    def step_rule(self) -> StepRule | None:
        """The base's, if it has one of its own."""
        return self.inner.step_rule

    @property
    def weighs_layers(self) -> bool:
        """Whether the base does."""
        return self.inner.weighs_layers

    @property
    def collectors(self) -> tuple[str, ...]:
        """What the base reads."""
        return self.inner.collectors

    @property
    def least(self) -> int:
        """The base's."""
        return self.inner.least

    @property
    def redistributes(self) -> bool:
        """The base's."""
        return self.inner.redistributes

    @property
    def observed_rows(self) -> int:
        """The base's."""
        return self.inner.observed_rows

    def recent(self, budget: int) -> int:
        """The base's."""
        return self.inner.recent(budget)
