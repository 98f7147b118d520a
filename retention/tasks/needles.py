"""Keyed needles over many images, asked in several turns after one prefill: which digit is right of the red K?

Every later turn needs what the first question ignored (deferred importance). With `asked_colour` only the
keys of one colour are ever asked, in training too: whether a gate learns which needles will matter. With `repeat`
some turns ask for an earlier key again, whose importance is not deferred any more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import EvidenceRef, Example, Segment, TextRef, Turn
from retention.embedded import LETTERS
from retention.tasks.base import Task
from retention.tasks.depth import depths
from retention.tasks.further import Row, asked_again
from retention.tasks.scene import COLOURS, GRID, N_KEYS, Needle, draw_scene, enlarged
from retention.types import require


@dataclass
class Needles(Task):
    """`n_needles` key-digit pairs over `n_images` images; `n_turns` distinct keys asked, one digit each."""

    name: ClassVar[str] = "needles"
    chance: ClassVar[float] = 0.1

    n_images: int = 16
    """Images per context, each 4 x 4 cells."""
    n_needles: int = 24
    """Key-digit pairs per context, spread over the images."""
    asked_colour: str | None = None
    """Only keys of this colour are asked; null asks any."""
    n_asked: int | None = None
    """How many needles have the asked colour."""
    n_turns: int = 8
    """Questions per context."""
    repeat: float = 0.0
    """Share of the turns that ask for an earlier key again, at random places behind the first."""
    cell_px: int = 8
    """Pixels per cell: 8 for the embedded model, patch x merge (28 or 32) for others."""

    def __post_init__(self) -> None:
        askable = self._askable()
        checks = (
            (
                1 <= self.n_needles <= min(N_KEYS, 8 * self.n_images),
                f"task.n_needles between 1 and {min(N_KEYS, 8 * self.n_images)}",
                self.n_needles,
            ),
            (self.asked_colour in (None, *COLOURS), f"task.asked_colour among {', '.join(COLOURS)}", self.asked_colour),
            (
                (self.asked_colour is None) == (self.n_asked is None),
                "task.n_asked exactly when task.asked_colour is set",
                self.n_asked,
            ),
            (
                askable is not None and 1 <= self.n_turns <= askable,
                f"task.n_turns between 1 and the {askable} askable needles",
                self.n_turns,
            ),
            (
                self.n_asked is None or self.n_asked <= len(LETTERS),
                f"task.n_asked of at most {len(LETTERS)}",
                self.n_asked,
            ),
            (
                self.n_asked is None or 0 <= self.n_needles - self.n_asked <= N_KEYS - len(LETTERS),
                f"task.n_asked between {max(0, self.n_needles - N_KEYS + len(LETTERS))} and task.n_needles {self.n_needles}",
                self.n_asked,
            ),
            (
                0 <= self.repeat <= 1 - 1 / max(1, self.n_turns),
                f"task.repeat between 0 and {1 - 1 / max(1, self.n_turns):g} with {self.n_turns} turns, the first of which is new",
                self.repeat,
            ),
            (self.cell_px >= 8, "task.cell_px of at least 8", self.cell_px),
        )
        require(checks)

    def example(
        self, seed: int, split: str, index: int, *, style: str = "symbolic", n_turns: int | None = None
    ) -> Example:
        """One context: images, then turns about keys in random order, distinct but for those asked again."""
        rng = self.rng(seed, split, index)
        scene = draw_scene(rng, self._keys(rng), n_images=self.n_images, split=split)
        askable = [x for x in scene.needles if self.asked_colour in (None, x.name[0])]
        order, count = rng.permutation(len(askable)).tolist(), self.n_turns if n_turns is None else n_turns
        asked = [askable[i] for i in self._repeated(rng, order, count)]
        segments = [Segment("image", enlarged(image, self.cell_px)) for image in scene.images]
        turns = [needle_turn(needle, style) for needle in asked]
        return Example(
            id=f"{self.name}/{self._variant()}/{split}/{seed}/{index}",
            segments=segments,
            turns=turns,
            query_position="deferred_turn" if len(asked) > 1 else "after",
            meta={
                "n_images": self.n_images,
                "grid": GRID,
                "variant": self._variant(),
                "chance": self.chance,
                "n_distractors": len(scene.needles) - len({needle.key for needle in asked}),
                "depth": depths(turns, segments),
            },
        )

    @classmethod
    def further(cls, rows: Sequence[Row]) -> dict[str, float]:
        """How turns that ask for an earlier key again are answered."""
        return super().further(rows) | asked_again(rows)

    def _repeated(self, rng: np.random.Generator, order: list[int], count: int) -> list[int]:
        """The first of an order, `count` in all, some of them taken again from those before."""
        if not self.repeat:
            return order[:count]
        again = set((1 + rng.permutation(self.n_turns - 1)[: round(self.repeat * self.n_turns)]).tolist())
        asked: list[int] = []
        for turn in range(count):
            fresh = len(set(asked))
            asked.append(order[int(rng.integers(fresh)) if turn in again else fresh])
        return asked

    def _askable(self) -> int | None:
        return self.n_needles if self.asked_colour is None else self.n_asked

    def _variant(self) -> str:
        asked = "any" if self.asked_colour is None else f"{self.n_asked}{self.asked_colour}"
        return f"{self.n_images}x{self.n_needles}-{asked}{f'-{self.repeat:g}r' if self.repeat else ''}"

    def _keys(self, rng: np.random.Generator) -> np.ndarray:
        """Distinct keys in random order, with exactly `n_asked` of the asked colour."""
        if self.asked_colour is None:
            return rng.permutation(N_KEYS)[: self.n_needles]
        colour = np.arange(N_KEYS) // len(LETTERS) == list(COLOURS).index(self.asked_colour)
        asked = rng.permutation(np.flatnonzero(colour))[: self.n_asked]
        others = rng.permutation(np.flatnonzero(~colour))[: self.n_needles - len(asked)]
        return rng.permutation(np.concatenate([asked, others]))


def needle_turn(needle: Needle, style: str) -> Turn:
    """Which digit is right of a needle's key."""
    colour, letter = needle.name
    symbolic = f"<ask> {colour}-{letter}"
    natural = f"Which digit is in the cell right of the {colour} letter {letter}? Answer with one digit."
    cells: list[EvidenceRef | TextRef] = [EvidenceRef(needle.image, needle.row, needle.column + i) for i in (0, 1)]
    return Turn(
        symbolic if style == "symbolic" else natural,
        str(needle.digit),
        cells,
        max_new_tokens=1 if style == "symbolic" else 8,
    )
