"""How many cells show this? The answer is spread over all of them, among cells that share one of its two attributes.

A choice of few cells must fail once there are more of them than it may keep; whoever merges or sums what it evicts need
not. The embedded model cannot count: its vocabulary holds digits as labels of scans, its training never asked for a
number. Its full cache answers at chance, so that nothing on it can be told apart by this task.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Turn
from retention.embedded import LETTERS
from retention.tasks import boards
from retention.tasks.context import Context
from retention.tasks.further import Row, number_error
from retention.tasks.names import one
from retention.tasks.procedural import Check, Procedural
from retention.tasks.scene import COLOURS, GRID

ATTRIBUTES = ("both", "colour", "letter")
MOST = 9
"""Largest count."""
Kind = tuple[str | None, str | None]
"""A colour and a letter, one of which may be any."""


@dataclass
class DiffuseCount(Procedural):
    """Coloured letters in 0 to 9 cells of `n_images` images, among letters that have only one of the two attributes."""

    name: ClassVar[str] = "diffuse_count"
    chance: ClassVar[float] = 0.1
    version: ClassVar[int] = 2
    styles: ClassVar[tuple[str, ...]] = ("symbolic", "natural")

    attribute: str = "both"
    """What the counted cells have in common: colour and letter (both), colour or letter."""
    n_images: int = 16
    """Images per context, each 4 x 4 cells."""
    n_distractors: int = 16
    """Letters that are not counted; for both half of them have the colour and half the letter."""

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy."""
        asked = 2 if self.query_position == "deferred_turn" else 1
        room = GRID * GRID // 2 * self.n_images - asked * MOST
        return (
            *super().checks(),
            (self.attribute in ATTRIBUTES, f"task.attribute among {', '.join(ATTRIBUTES)}", self.attribute),
            (room >= 0, f"task.n_images of at least {1 + asked}", self.n_images),
            (0 <= self.n_distractors <= room, f"task.n_distractors between 0 and {room}", self.n_distractors),
        )

    def draw(self, rng: np.random.Generator, context: Context) -> list[Turn]:
        """The images, then the question; when turns are deferred, another about other cells."""
        if context.style == "symbolic" and self.attribute != "both":
            raise ValueError(
                f"expected model.prompt_style natural for diffuse_count with task.attribute {self.attribute}, got symbolic"
            )
        colours = [list(COLOURS)[int(i)] for i in rng.permutation(len(COLOURS))]
        letters = [LETTERS[int(i)] for i in rng.permutation(len(LETTERS))]
        count = 2 if self.query_position == "deferred_turn" else 1
        kinds: list[Kind] = [
            (None if self.attribute == "letter" else colours[i], None if self.attribute == "colour" else letters[i])
            for i in range(count)
        ]
        every = [(colour, letter) for colour in COLOURS for letter in LETTERS]
        words = []
        for number, kind in enumerate(kinds):
            own = [word for word in every if _is(word, kind) and not _is(word, *kinds[:number], *kinds[number + 1 :])]
            words += [own[int(i)] for i in rng.integers(len(own), size=int(rng.integers(MOST + 1)))]
        words += self._others(rng, kinds, every)
        shown = boards.blank(self.n_images, GRID)
        for place, word in zip(rng.permutation(shown.size), words, strict=False):
            shown.flat[place] = "-".join(word)
        for board in shown:
            context.show(board)
        return [self._turn(context, shown, kind) for kind in kinds]

    def _others(
        self, rng: np.random.Generator, kinds: list[Kind], every: list[tuple[str, str]]
    ) -> list[tuple[str, str]]:
        """Letters that no question counts, half of them sharing the colour of what the first one counts, half the letter."""
        free = [word for word in every if not _is(word, *kinds)]
        near = [[word for word in free if word[axis] == kinds[0][axis]] or free for axis in (0, 1)]
        return [near[i % 2][int(rng.integers(len(near[i % 2])))] for i in range(self.n_distractors)]

    def _turn(self, context: Context, shown: boards.Words, kind: Kind) -> Turn:
        words = ((place, str(shown[place])) for place in np.ndindex(*shown.shape))
        places = [place for place, word in words if word and _is(word.split("-"), kind)]
        colour, letter = kind
        what = {
            "both": f"the {colour} letter {letter}",
            "colour": f"{one(str(colour))} letter",
            "letter": f"the letter {letter} in any colour",
        }[self.attribute]
        question = f"How many cells show {what}? Answer with one digit."
        if context.style == "symbolic":
            question = f"<ask> {colour}-{letter}"
        refs = [context.cell(*place) for place in places]
        return Turn(question, str(len(places)), refs, max_new_tokens=1 if context.style == "symbolic" else 8)

    @classmethod
    def further(cls, rows: Sequence[Row]) -> dict[str, float]:
        """How far off the counts are."""
        return super().further(rows) | number_error(rows)

    def variant(self) -> str:
        """What is counted, images and distractors."""
        return f"{self.attribute}-{self.n_images}+{self.n_distractors}"


def _is(word: Sequence[str], *kinds: Kind) -> bool:
    """Whether a coloured letter is of any of the kinds."""
    return any(all(wanted in (None, own) for own, wanted in zip(word, kind, strict=True)) for kind in kinds)
