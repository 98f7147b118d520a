"""How many cells show this key? The answer is spread over all of them; distractors share its colour or its letter.

The embedded model cannot count: its vocabulary holds digits as labels of scans, its training never asked for a
number. Its full cache answers at chance, so that nothing on it can be told apart by this task.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import EvidenceRef, Example, Segment, Turn
from retention.embedded import LETTERS
from retention.tasks.base import Task
from retention.tasks.scene import COLOURS, GRID, KEY0, N_KEYS, draw_cells, enlarged, key_name
from retention.types import require


@dataclass
class DiffuseCount(Task):
    """A key glyph in 0 to 9 cells of `n_images` images, among glyphs that share one of its two attributes."""

    name: ClassVar[str] = "diffuse_count"
    chance: ClassVar[float] = 0.1

    n_images: int = 16
    """Images per context, each 4 x 4 cells."""
    n_distractors: int = 16
    """Glyphs of the same letter in another colour or of another letter in the same colour, half each."""
    cell_px: int = 8
    """Pixels per cell: 8 for the embedded model, patch x merge (28 or 32) for others."""

    def __post_init__(self) -> None:
        room = 8 * self.n_images - 9
        checks = (
            (self.n_images >= 2, "task.n_images of at least 2", self.n_images),
            (0 <= self.n_distractors <= room, f"task.n_distractors between 0 and {room}", self.n_distractors),
            (self.cell_px >= 8, "task.cell_px of at least 8", self.cell_px),
        )
        require(checks)

    def example(
        self, seed: int, split: str, index: int, *, style: str = "symbolic", n_turns: int | None = None
    ) -> Example:
        """One context: images, then the one question; it has no further turns."""
        rng = self.rng(seed, split, index)
        asked, count = int(rng.integers(N_KEYS)), int(rng.integers(10))
        colour, letter = divmod(asked, len(LETTERS))
        recoloured = (colour + rng.integers(1, len(COLOURS), size=self.n_distractors)) % len(COLOURS) * len(LETTERS)
        relettered = (letter + rng.integers(1, len(LETTERS), size=self.n_distractors)) % len(LETTERS)
        other = np.where(np.arange(self.n_distractors) % 2, recoloured + letter, colour * len(LETTERS) + relettered)
        cells = np.zeros((self.n_images, GRID, GRID), np.int64)
        places = rng.permutation(cells.size)[: count + self.n_distractors]
        cells.flat[places] = KEY0 + np.concatenate([np.full(count, asked), other])
        images = draw_cells(rng, cells, split=split)
        found = [EvidenceRef(*(int(i) for i in np.unravel_index(p, cells.shape))) for p in sorted(places[:count])]
        symbolic = "<ask> {}-{}".format(*key_name(asked))
        natural = "How many cells show the {} letter {}? Answer with one digit.".format(*key_name(asked))
        return Example(
            id=f"{self.name}/{self.n_images}+{self.n_distractors}/{split}/{seed}/{index}",
            segments=[Segment("image", enlarged(image, self.cell_px)) for image in images],
            turns=[
                Turn(
                    symbolic if style == "symbolic" else natural,
                    str(count),
                    list(found),
                    max_new_tokens=1 if style == "symbolic" else 8,
                )
            ],
            query_position="after",
            meta={
                "n_images": self.n_images,
                "grid": GRID,
                "chance": self.chance,
                "n_distractors": self.n_distractors,
            },
        )
