"""An image with one quarter taken out, and four quarters to choose from: rows tell shapes, columns tell colours."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Turn
from retention.tasks import boards
from retention.tasks.context import Context
from retention.tasks.names import CHOICES
from retention.tasks.procedural import Procedural
from retention.tasks.scene import GRID

HALF, OPTIONS = GRID // 2, 4


@dataclass
class Jigsaw(Procedural):
    """The first picture has a gap; the next four show what may fill it."""

    name: ClassVar[str] = "jigsaw"
    chance: ClassVar[float] = 1 / OPTIONS
    positions: ClassVar[tuple[str, ...]] = ("before", "after")

    def draw(self, rng: np.random.Generator, context: Context) -> list[Turn]:
        """The picture, the four quarters, then the question."""
        shapes = [boards.SHAPES[int(i)] for i in rng.permutation(len(boards.SHAPES))[:GRID]]
        colours = [list(boards.PALETTE)[int(i)] for i in rng.permutation(len(boards.PALETTE))[:GRID]]
        whole = np.array([[f"{c}-{s}" for c in colours] for s in shapes], dtype=object)
        top, left = (int(x) * HALF for x in rng.integers(2, size=2))
        gap = slice(top, top + HALF), slice(left, left + HALF)
        right = whole[gap].copy()
        swapped = [right, right[::-1], right[:, ::-1], right[::-1, ::-1]]
        whole[gap] = ""
        numbers = [context.show(whole, decoys=False)]
        order = rng.permutation(OPTIONS).tolist()
        for option in order:
            board = boards.blank(1, GRID)[0]
            board[:HALF, :HALF] = swapped[option]
            numbers.append(context.show(board, decoys=False))
        # what the two neighbouring quarters show, and the four cells of every option
        evidence = [
            context.cell(0, row, column)
            for row, column in np.ndindex(GRID, GRID)
            if (top <= row < top + HALF) ^ (left <= column < left + HALF)
        ]
        evidence += [context.cell(n, row, column) for n in numbers[1:] for row, column in np.ndindex(HALF, HALF)]
        question = (
            "The first picture lacks a quarter. Which of the four pictures after it, A to D in order, "
            "shows in its upper left what belongs there? Answer with one letter."
        )
        answer, choices = CHOICES[order.index(0)], [f"picture {n + 1}" for n in range(1, OPTIONS + 1)]
        return [Turn(question, answer, evidence, "choice_letter", max_new_tokens=8, needs_all=False, choices=choices)]

    def variant(self) -> str:
        """There is one."""
        return f"{GRID}x{GRID}"
