"""Many tiles of shape, colour and digit, and a description that fits one of them or none: where is it?

Whether positions survive eviction: a tile alone does not say where it stands.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Turn
from retention.tasks import boards
from retention.tasks.context import Context
from retention.tasks.names import one
from retention.tasks.procedural import Check, Procedural

ABSENT = "-1"


@dataclass
class TileIndex(Procedural):
    """`n_images` images of `side` x `side` tiles; a tile takes 2 x 2 cells, a coloured shape and right of it a digit."""

    name: ClassVar[str] = "tile_index"
    chance: ClassVar[float] = 0.5
    positions: ClassVar[tuple[str, ...]] = ("before", "after")

    n_images: int = 4
    """Images per context."""
    side: int = 2
    """Tiles per side of an image."""

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy."""
        return (
            *super().checks(),
            (self.n_images >= 1, "task.n_images of at least 1", self.n_images),
            (self.side >= 1, "task.side of at least 1", self.side),
            (
                4 <= self.n_images * self.side**2 <= 200,
                "between 4 and 200 tiles in a context",
                self.n_images * self.side**2,
            ),
        )

    def draw(self, rng: np.random.Generator, context: Context) -> list[Turn]:
        """Tiles, half of them sharing two of the three properties asked for, then the question."""
        count = self.n_images * self.side**2
        asked = int(rng.integers(len(boards.MARKS) * 10))
        there = bool(rng.integers(2))
        near = self._near(asked)
        far = np.setdiff1d(np.arange(len(boards.MARKS) * 10), [asked, *near])
        n_near = min(len(near), (count - 1) // 2)
        tiles = [asked] * there + rng.permutation(near)[:n_near].tolist()
        tiles += rng.choice(far, count - len(tiles), replace=False).tolist()
        tiles = [int(tile) for tile in rng.permutation(tiles)]
        for image in range(self.n_images):
            board = boards.blank(1, 2 * self.side)[0]
            for place, tile in enumerate(tiles[image * self.side**2 : (image + 1) * self.side**2]):
                row, column = (2 * x for x in divmod(place, self.side))
                board[row, column : column + 2] = boards.MARKS[tile // 10], str(tile % 10)
            context.show(board)
        found = [tiles.index(asked)] if there else range(count)
        evidence = []
        for tile in found:
            image, place = divmod(tile, self.side**2)
            row, column = (2 * x for x in divmod(place, self.side))
            evidence += [context.cell(image, row, column + i) for i in (0, 1)]
        answer = ABSENT
        if there:
            image, place = divmod(found[0], self.side**2)
            answer = ",".join(str(x + 1) for x in (image, *divmod(place, self.side)))
        colour, shape = boards.MARKS[asked // 10].split("-")
        question = (
            f"Each picture has {self.side} x {self.side} tiles, a coloured shape with a digit right of it. "
            f"Where is the tile with {one(colour)} {shape} and the digit {asked % 10}? "
            f"Answer picture,row,column counted from 1, or {ABSENT} if there is none."
        )
        return [Turn(question, answer, evidence, scorer="index_triplet", max_new_tokens=16)]

    def _near(self, asked: int) -> list[int]:
        """Tiles that share two of colour, shape and digit with one."""
        mark, digit = divmod(asked, 10)
        colour, shape = divmod(mark, len(boards.SHAPES))
        other_digit = [mark * 10 + d for d in range(10) if d != digit]
        other_shape = [(colour * len(boards.SHAPES) + s) * 10 + digit for s in range(len(boards.SHAPES)) if s != shape]
        n = len(boards.PALETTE)
        other_colour = [(c * len(boards.SHAPES) + shape) * 10 + digit for c in range(n) if c != colour]
        return [*other_digit, *other_shape, *other_colour]

    def variant(self) -> str:
        """Images and tiles."""
        return f"{self.n_images}x{self.side}"
