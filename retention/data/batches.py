"""Which rows form a batch: rows of like length, within budgets of rows, tokens and images, shared out over processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retention.data.media import BadRow


@dataclass
class Slot:
    """One row to be read: its source, its number there, what it is guessed to take."""

    source: int
    number: int
    tokens: int = 0
    images: int = 0
    raw: Mapping[str, Any] | BadRow | None = None
    """The row itself where it cannot be read again: of a stream."""


@dataclass(frozen=True)
class Limits:
    """Budgets of one batch."""

    rows: int
    tokens: int | None = None
    """Rows times the tokens of the longest, padding among them; of packed rows the tokens they have."""
    images: int | None = None
    packed: bool = False
    """Whether the decoder gets the rows without padding. What is told beside it is padded, to twice the tokens at most."""

    def hold(self, sizes: Sequence[tuple[int, int]]) -> bool:
        """Whether rows of these tokens and images are within the budgets; a single row always is."""
        if len(sizes) <= 1:
            return True
        padded, own, images = max(t for t, _ in sizes) * len(sizes), sum(t for t, _ in sizes), sum(i for _, i in sizes)
        tokens = max(own, padded / 2) if self.packed else padded
        return (
            len(sizes) <= self.rows
            and (self.tokens is None or tokens <= self.tokens)
            and (self.images is None or images <= self.images)
        )


def runs(sizes: Sequence[tuple[int, int]], limits: Limits) -> list[slice]:
    """Neighbours that form batches: each as many as the budgets hold, in the order given."""
    found, start = [], 0
    for end in range(1, len(sizes) + 1):
        if end == len(sizes) or not limits.hold(sizes[start : end + 1]):
            found.append(slice(start, end))
            start = end
    return found


def planned(slots: Sequence[Slot], limits: Limits, ranks: int, generator: np.random.Generator) -> list[list[Slot]]:
    """Batches of a stretch of rows: cut along their length, in random order, a multiple of the processes' number.

    Batches are halved until they can be dealt out evenly; where even single rows cannot, the last are left out.
    """
    by_length = sorted(slots, key=lambda slot: slot.tokens)  # stable: rows of equal length stay as drawn
    batches = [by_length[run] for run in runs([(s.tokens, s.images) for s in by_length], limits)]
    while len(batches) % ranks and any(len(batch) > 1 for batch in batches):
        largest = max(range(len(batches)), key=lambda i: len(batches[i]))
        half = len(batches[largest]) // 2
        batches[largest : largest + 1] = [batches[largest][:half], batches[largest][half:]]
    order = generator.permutation(len(batches))
    return [batches[i] for i in order[: len(batches) - len(batches) % ranks]]
