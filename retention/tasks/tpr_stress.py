"""A fixed number of images in more and more text that says nothing, asked about the images.

Policies that keep all text drop every image once the text alone exceeds the budget.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.tasks import boards
from retention.tasks.context import Context
from retention.tasks.filler import filler
from retention.tasks.keyed import Keyed
from retention.tasks.procedural import Check


@dataclass
class TprStress(Keyed):
    """Keyed needles in few boards, with `n_words` words of filler spread behind them."""

    name: ClassVar[str] = "tpr_stress"

    n_images: int = 8
    """Boards with pairs per context, each 4 x 4 cells."""
    n_needles: int = 12
    """Key-digit pairs per context, spread over the boards."""
    n_words: int = 128
    """Words that say nothing: sweep them around the budget."""

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy."""
        return (*super().checks(), (self.n_words >= 0, "task.n_words of 0 or more", self.n_words))

    def show_all(self, rng: np.random.Generator, context: Context, shown: boards.Words) -> list[int]:
        """The boards in order, each followed by its share of the text."""
        units = filler(rng, context.split, self.n_words, context.style) if self.n_words else []
        for board, own in zip(shown, np.array_split(np.arange(len(units)), len(shown)), strict=True):
            context.show(board)
            if len(own):
                context.say(" ".join(units[i] for i in own))
        return list(range(len(shown)))

    def variant(self) -> str:
        """Boards, pairs, turns and words."""
        return f"{super().variant()}-{self.n_words}w"
