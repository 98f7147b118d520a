"""A fixed number of images in more and more text that says nothing, asked about the images.

Policies that keep all text drop every image once the text alone exceeds the budget. With `text_to_budget` the text is
measured against a budget in tokens of the model: the presets `tpr_stress_25` to `tpr_stress_400` are the points of a sweep.
"""

import copy
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Example, Segment, Turn
from retention.tasks import boards
from retention.tasks.context import Context
from retention.tasks.filler import filler
from retention.tasks.keyed import Keyed
from retention.tasks.procedural import Check
from retention.tasks.words import words_of


@dataclass
class TprStress(Keyed):
    """Keyed needles in few boards, with `n_words` words of filler spread behind them."""

    name: ClassVar[str] = "tpr_stress"

    n_images: int = 8
    """Boards with pairs per context, each 4 x 4 cells."""
    n_needles: int = 12
    """Key-digit pairs per context, spread over the boards."""
    n_words: int = 128
    """Words that say nothing, where `text_to_budget` is null."""
    text_to_budget: float | None = None
    """Tokens that say nothing, as a multiple of `budget`; natural text comes in whole sentences, as many as that holds."""
    budget: int = 128
    """Entries per layer and head that the text is measured against: the budget that is evaluated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.measure: Callable[[Example], int] = words_of

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy."""
        return (
            *super().checks(),
            (self.n_words >= 0, "task.n_words of 0 or more", self.n_words),
            (
                self.text_to_budget is None or self.text_to_budget >= 0,
                "task.text_to_budget of 0 or more",
                self.text_to_budget,
            ),
            (self.budget >= 1, "task.budget of at least 1", self.budget),
        )

    def measured(self, measure: Callable[[Example], int]) -> "TprStress":
        """This task with text in a model's tokens."""
        task = copy.copy(self)
        task.measure = measure
        return task

    def show_all(self, rng: np.random.Generator, context: Context, shown: boards.Words) -> list[int]:
        """The boards in order, each followed by its share of the text."""
        units = self._text(rng, context)
        for board, own in zip(shown, np.array_split(np.arange(len(units)), len(shown)), strict=True):
            context.show(board)
            if len(own):
                context.say(" ".join(units[i] for i in own))
        return list(range(len(shown)))

    def _text(self, rng: np.random.Generator, context: Context) -> list[str]:
        """Units of filler: so many words, or as many as their tokens allow, of which `meta` tells the number."""
        if self.text_to_budget is None:
            return filler(rng, context.split, self.n_words, context.style) if self.n_words else []
        most = round(self.text_to_budget * self.budget)
        units = filler(rng, context.split, most, context.style) if most else []
        count = bisect_right(range(len(units) + 1), most, key=lambda n: self._tokens(units[:n])) - 1
        context.told["n_text_tokens"] = self._tokens(units[:count])
        return units[:count]

    def _tokens(self, units: list[str]) -> int:
        """What units add to a context."""
        said, silent = (
            self.measure(Example("", [Segment("text", text)], [Turn("", "")], "after"))
            for text in (" ".join(units), "")
        )
        return said - silent

    def variant(self) -> str:
        """Boards, pairs, turns and words, or tokens and the budget they are measured against."""
        text = f"{self.n_words}w" if self.text_to_budget is None else f"{self.text_to_budget:g}of{self.budget}"
        return f"{super().variant()}-{text}"
