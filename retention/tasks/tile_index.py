"""Many tiles of shape, colour and digit, and descriptions that each fit one of them or none: where are they?

Whether positions survive eviction: a tile alone does not say where it stands.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Turn
from retention.tasks import boards
from retention.tasks.context import Context, Ref
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
    n_targets: int = 1
    """Descriptions in one question; the answer to several is a list."""

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy."""
        tiles = self.n_images * self.side**2
        return (
            *super().checks(),
            (self.n_images >= 1, "task.n_images of at least 1", self.n_images),
            (self.side >= 1, "task.side of at least 1", self.side),
            (4 <= tiles <= 200, "between 4 and 200 tiles in a context", tiles),
            (1 <= self.n_targets <= tiles // 2, f"task.n_targets between 1 and {tiles // 2}", self.n_targets),
        )

    def draw(self, rng: np.random.Generator, context: Context) -> list[Turn]:
        """Tiles, half of them sharing two of the three properties asked for, then the question."""
        count, every = self.n_images * self.side**2, len(boards.MARKS) * 10
        asked: list[int] = []
        while len(asked) < self.n_targets:
            asked += {int(rng.integers(every))}.difference(asked)
        shown = [tile for tile in asked if rng.integers(2)]
        near = [tile for target in asked for tile in self._near(target)]
        near = [tile for tile in dict.fromkeys(near) if tile not in asked]
        far = np.setdiff1d(np.arange(every), [*asked, *near])
        n_near = min(len(near), (count - self.n_targets) // 2)
        tiles = shown + rng.permutation(near)[:n_near].tolist()
        tiles += rng.choice(far, count - len(tiles), replace=False).tolist()
        tiles = [int(tile) for tile in rng.permutation(tiles)]
        for image in range(self.n_images):
            board = boards.blank(1, 2 * self.side)[0]
            for place, tile in enumerate(tiles[image * self.side**2 : (image + 1) * self.side**2]):
                row, column = (2 * x for x in divmod(place, self.side))
                board[row, column : column + 2] = boards.MARKS[tile // 10], str(tile % 10)
            context.show(board)
        # that one is not there, all tiles tell together
        found = [tiles.index(tile) for tile in asked] if shown == asked else range(count)
        evidence = []
        for tile in found:
            image, place = divmod(tile, self.side**2)
            row, column = (2 * x for x in divmod(place, self.side))
            evidence += [context.cell(image, row, column + i) for i in (0, 1)]
        where = [self._where(tiles, tile) for tile in asked]
        ask = self._ask_one if self.n_targets == 1 else self._ask_many
        return [ask([self._told(tile) for tile in asked], where, evidence)]

    def _ask_one(self, told: list[str], where: list[list[int]], evidence: list[Ref]) -> Turn:
        answer = ",".join(map(str, where[0])) or ABSENT
        question = (
            f"Each picture has {self.side} x {self.side} tiles, a coloured shape with a digit right of it. "
            f"Where is the tile with {told[0]}? "
            f"Answer picture,row,column counted from 1, or {ABSENT} if there is none."
        )
        return Turn(question, answer, evidence, scorer="index_triplet", max_new_tokens=16)

    def _ask_many(self, told: list[str], where: list[list[int]], evidence: list[Ref]) -> Turn:
        answer = "[" + ", ".join("/".join(map(str, place)) or ABSENT for place in where) + "]"
        question = (
            f"Each picture has {self.side} x {self.side} tiles, a coloured shape with a digit right of it. "
            f"Where are the tiles with {'; '.join(told)}? Answer with a list in this order, such as [1/2/1, {ABSENT}]: "
            f"picture/row/column counted from 1, or {ABSENT} where there is none."
        )
        return Turn(question, answer, evidence, scorer="list_soft", max_new_tokens=12 * len(told) + 8)

    def _where(self, tiles: list[int], tile: int) -> list[int]:
        """Picture, row and column of a tile, from 1; none where it is not there."""
        if tile not in tiles:
            return []
        image, place = divmod(tiles.index(tile), self.side**2)
        return [x + 1 for x in (image, *divmod(place, self.side))]

    def _told(self, tile: int) -> str:
        colour, shape = boards.MARKS[tile // 10].split("-")
        return f"{one(colour)} {shape} and the digit {tile % 10}"

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
        """Images, tiles and descriptions."""
        return f"{self.n_images}x{self.side}-{self.n_targets}"
