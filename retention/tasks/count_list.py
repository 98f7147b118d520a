"""Several counts in the order they are told or shown: how many survive, and does their order?"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Turn
from retention.tasks import boards
from retention.tasks.context import Context, Ref
from retention.tasks.filler import filler
from retention.tasks.names import coined
from retention.tasks.procedural import Check, Procedural
from retention.tasks.scene import GRID

MOST = 4
"""Largest count of a kind of thing."""


@dataclass
class CountList(Procedural):
    """`n_counts` counts of one kind of thing, 0 to 4 each, among as many of another kind."""

    name: ClassVar[str] = "count_list"
    chance: ClassVar[float] = 1 / (MOST + 1)

    shown: str = "text"
    """text: a statement per count; image: an image per count, whose shapes are to be counted."""
    n_counts: int = 5
    """Counts to list."""
    n_words: int = 100
    """Words of filler between the statements (text)."""

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy."""
        return (
            *super().checks(),
            (self.shown in ("text", "image"), "task.shown of text or image", self.shown),
            (1 <= self.n_counts <= 26, "task.n_counts between 1 and 26", self.n_counts),
            (self.n_words >= 0, "task.n_words of 0 or more", self.n_words),
        )

    def draw(self, rng: np.random.Generator, context: Context) -> list[Turn]:
        """Statements or images in order, then the turn about one kind of thing and the one about the other."""
        counts = rng.integers(MOST + 1, size=(2, self.n_counts))
        if self.shown == "image":
            kinds = [boards.MARKS[int(i)] for i in rng.permutation(len(boards.MARKS))[:2]]
            refs = self._images(rng, context, kinds, counts)
            names = [f"{kind.replace('-', ' ')} shapes" for kind in kinds]
            ask = "How many {} does each picture show? Answer with a list of {} numbers in order, such as [1, 2]."
        else:
            names = [f"{word}s" for word in coined(rng, context.split, 2)]
            refs = self._statements(rng, context, names, counts)
            ask = "How many {} were counted at each time? Answer with a list of {} numbers in order, such as [1, 2]."
        return [
            Turn(
                ask.format(name, self.n_counts),
                "[" + ", ".join(str(n) for n in own) + "]",
                found,
                scorer="list_soft",
                max_new_tokens=4 * self.n_counts + 8,
            )
            for name, own, found in zip(names, counts.tolist(), refs, strict=True)
        ]

    def _statements(
        self, rng: np.random.Generator, context: Context, names: list[str], counts: np.ndarray
    ) -> list[list[Ref]]:
        refs: list[list[Ref]] = [[], []]
        units = filler(rng, context.split, self.n_words, "natural") if self.n_words else []
        shares = np.array_split(np.arange(len(units)), 2 * self.n_counts + 1)
        for step in range(2 * self.n_counts):
            for i in shares[step]:
                context.say(units[i])
            time, kind = divmod(step, 2)
            refs[kind].append(context.say(f"At time {time + 1} there were {counts[kind, time]} {names[kind]}."))
        for i in shares[-1]:
            context.say(units[i])
        return refs

    def _images(
        self, rng: np.random.Generator, context: Context, kinds: list[str], counts: np.ndarray
    ) -> list[list[Ref]]:
        """One image per count of both kinds, in different cells."""
        refs: list[list[Ref]] = [[], []]
        for image in range(self.n_counts):
            board = boards.blank(1, GRID)[0]
            for kind, own in zip(kinds, counts[:, image].tolist(), strict=True):
                boards.scatter(rng, board, [kind] * own)
            number = context.show(board)
            for kind, found in zip(kinds, refs, strict=True):
                places = np.argwhere(board == kind).tolist()
                found += [context.cell(number, row, column) for row, column in places]
        return refs

    def variant(self) -> str:
        """How counts are shown, how many, and how much stands between them."""
        return f"{self.shown}-{self.n_counts}-{self.n_words}w"
