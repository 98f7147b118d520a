"""Two regions of the same images, asked about one after the other with filler in between: what did the first cost?

With `b_first` the same second region is asked about first: the difference, example by example, is the deferred penalty.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from retention.data.example import Turn
from retention.tasks import boards
from retention.tasks.context import Context, Ref
from retention.tasks.filler import filler
from retention.tasks.further import Row, gap
from retention.tasks.keyed import digit_turn, key_words
from retention.tasks.procedural import Check, Procedural
from retention.tasks.scene import GRID

HALF = GRID // 2


@dataclass
class DeferredRegion(Procedural):
    """Each image holds a pair in region A and one in region B, opposite quarters with no row or column in common."""

    name: ClassVar[str] = "deferred_region"
    chance: ClassVar[float] = 0.1
    styles: ClassVar[tuple[str, ...]] = ("symbolic", "natural")
    positions: ClassVar[tuple[str, ...]] = ("deferred_turn",)

    query_position: str = "deferred_turn"
    """This task is about deferred turns alone."""
    n_images: int = 4
    """Images of 4 x 4 cells, one to four."""
    n_words: int = 64
    """Words of filler between the two questions."""
    b_first: bool = False
    """Whether region B is asked about first: the control."""

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy."""
        return (
            *super().checks(),
            (1 <= self.n_images <= 4, "task.n_images between 1 and 4", self.n_images),
            (self.n_words >= 0, "task.n_words of 0 or more", self.n_words),
        )

    def paired(self) -> str:
        """What a context shares with the one asked in the other order."""
        return f"{self.n_images}-{self.n_words}w"

    @classmethod
    def further(cls, rows: Sequence[Row]) -> dict[str, float]:
        """The deferred penalty, where contexts were asked in both orders: region B first, less region B second."""
        penalty = gap(rows, "order", "first", "second")
        return super().further(rows) | ({} if penalty is None else {"deferred_penalty": penalty})

    def draw(self, rng: np.random.Generator, context: Context) -> list[Turn]:
        """The images, then the turn about region B and the one about region A."""
        context.told["groups"] = {"order": "first" if self.b_first else "second"}
        shown, keys = boards.blank(self.n_images, GRID), key_words(rng, 2 * self.n_images)
        digits = [str(digit) for digit in rng.integers(10, size=len(keys))]
        places = []
        for number, board in enumerate(shown):
            flipped = bool(rng.integers(2))
            for region in (0, 1):
                row = region * HALF + int(rng.integers(HALF))
                column = (region ^ flipped) * HALF
                pair = 2 * number + region
                board[row, column : column + 2] = keys[pair], digits[pair]
                places.append((number, row, column))
        for board in shown:
            context.show(board)
        turns = []
        asked = int(rng.integers(self.n_images))
        for pair in (2 * asked + 1, 2 * asked):
            number, row, column = places[pair]
            refs: list[Ref] = [context.cell(number, row, column + i) for i in (0, 1)]
            turns.append(digit_turn(keys[pair], digits[pair], refs, context.style))
        words = filler(rng, context.split, self.n_words, context.style) if self.n_words else []
        second = 1 if self.b_first else 0
        turns[second].question = " ".join([*words, turns[second].question])
        return turns

    def arranged(self, drawn: list[Turn], count: int) -> list[Turn]:
        """Only region B is scored, whether it comes second or first."""
        b, a = drawn[0], replace(drawn[1], scored=False)
        return [b, a] if self.b_first else [a, b]

    def variant(self) -> str:
        """Images, words in between and which region comes first."""
        return f"{self.n_images}-{self.n_words}w-{'ba' if self.b_first else 'ab'}"
