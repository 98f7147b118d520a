"""Which row of which source is read when: fixed by seed and epoch, so that any place is reached without the ones before."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Int

STREAMED = 8192
"""Rows of an epoch where a source is a stream, whose length nobody knows."""


class Mixture:
    """Sources mixed by weight.

    Every epoch draws the same number of rows of each source, in an order of its own. The draws of a source are counted
    through all epochs: a stream is read on, other sources go through all their rows, shuffled anew, before any row
    comes again.
    """

    def __init__(self, lengths: Sequence[int | None], weights: Sequence[float | None], seed: int) -> None:
        """Sources of these lengths (None for streams) and weights, given for all or for none.

        Raises:
            ValueError: where only some weights are given.
        """
        known = [length for length in lengths if length is not None]
        if len({weight is None for weight in weights}) > 1:
            raise ValueError(f"expected a weight in every source or in none, got {list(weights)}")
        self.lengths, self.seed = list(lengths), seed
        self.size = sum(known) if len(known) == len(lengths) else STREAMED
        parts = [weight for weight in weights if weight is not None]
        if not parts:
            parts = [float(n) for n in known] if len(known) == len(lengths) else [1.0] * len(lengths)
        self.counts = _shared_out(self.size, parts)
        self.size = sum(self.counts)
        self.order = lru_cache(maxsize=2)(self._order)
        self._shuffled = lru_cache(maxsize=2 * len(lengths))(self._permutation)

    def _order(self, epoch: int) -> Int[np.ndarray, "rows 2"]:
        """Source and draw of every example of an epoch."""
        sources = np.repeat(np.arange(len(self.counts)), self.counts)
        np.random.default_rng([self.seed, epoch]).shuffle(sources)
        draws = np.empty_like(sources)
        for source, count in enumerate(self.counts):
            draws[sources == source] = np.arange(count) + epoch * count
        return np.stack([sources, draws], 1)

    def row(self, source: int, draw: int) -> int:
        """Number of the row that a draw of a source takes; the draw itself in a stream."""
        length = self.lengths[source]
        if length is None:
            return draw
        turn, place = divmod(draw, length)
        return int(self._shuffled(source, turn)[place])

    def _permutation(self, source: int, turn: int) -> Int[np.ndarray, " rows"]:
        length = self.lengths[source]
        assert length is not None
        return np.random.default_rng([self.seed, source, turn, 1]).permutation(length)


def _shared_out(size: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportions of weights that sum to `size`, at least 1 each: largest remainders."""
    exact = np.array(weights) / sum(weights) * size
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: size - int(counts.sum())]] += 1
    return np.maximum(counts, 1).tolist()
