"""Many questions about the same images, each asked on its own of the same evicted cache: coverage, not luck."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from retention.tasks.further import Row, worst
from retention.tasks.keyed import Keyed


@dataclass
class MultiQuery(Keyed):
    """Keyed needles whose questions see nothing of one another; look at their mean and at the worst of them."""

    name: ClassVar[str] = "multi_query"
    positions: ClassVar[tuple[str, ...]] = ("after",)
    independent: ClassVar[bool] = True

    n_needles: int = 32
    """Key-digit pairs per context, spread over the boards."""
    n_turns: int = 16
    """Questions per context."""

    @classmethod
    def further(cls, rows: Sequence[Row]) -> dict[str, float]:
        """The worst of a context's questions."""
        return super().further(rows) | worst(rows)
