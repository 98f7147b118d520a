"""Three statements that only together answer: with each kept at rate r, about r cubed of the answers are left.

`containment`: what is in what, three steps. `ordering`: who is taller than whom, three steps.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Turn
from retention.embedded import LETTERS
from retention.tasks import boards
from retention.tasks.context import Context, Ref
from retention.tasks.filler import filler
from retention.tasks.names import CHOICES, coined, lettered
from retention.tasks.procedural import Check, Procedural
from retention.tasks.scene import GRID, pair_places

CHAINS, LINKS = 4, 3
LEVELS = ("box", "crate", "room", "building")
COLOURS = ("red", "green", "blue", "yellow")
PER_BOARD = 2


@dataclass
class ThreeStatements(Procedural):
    """Four chains of three links at random depths; the question follows one of them."""

    name: ClassVar[str] = "three_statements"
    chance: ClassVar[float] = 0.25

    kind: str = "containment"
    """containment (four choices) or ordering (yes or no)."""
    shown: str = "text"
    """text: a sentence per link; image: two neighbouring letters per link (containment)."""
    n_words: int = 100
    """Words of filler between the sentences."""

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy."""
        return (
            *super().checks(),
            (self.kind in ("containment", "ordering"), "task.kind of containment or ordering", self.kind),
            (self.shown in ("text", "image"), "task.shown of text or image", self.shown),
            (self.shown == "text" or self.kind == "containment", "task.shown of text for ordering", self.shown),
            (self.n_words >= 0, "task.n_words of 0 or more", self.n_words),
        )

    @property
    def guess(self) -> float:
        """One of four, or yes and no."""
        return self.chance if self.kind == "containment" else 0.5

    def draw(self, rng: np.random.Generator, context: Context) -> list[Turn]:
        """All links in random order, then turns about two of the chains."""
        order = [divmod(int(i), LINKS) for i in rng.permutation(CHAINS * LINKS)]
        if self.shown == "image":
            names = [
                [f"{COLOURS[i]}-{LETTERS[int(k)]}" for k in rng.permutation(len(LETTERS))[:CHAINS]] for i in range(4)
            ]
            refs = self._cells(rng, context, names, order)
        else:
            words = coined(rng, context.split, CHAINS * len(LEVELS))
            names = [words[i :: len(LEVELS)] for i in range(len(LEVELS))]
            refs = self._sentences(rng, context, names, order)
        ask = self._contained if self.kind == "containment" else self._taller
        return [ask(rng, names, int(chain), refs) for chain in rng.permutation(CHAINS)[:2]]

    def _sentences(
        self, rng: np.random.Generator, context: Context, names: list[list[str]], order: list[tuple[int, int]]
    ) -> dict[tuple[int, int], list[Ref]]:
        refs: dict[tuple[int, int], list[Ref]] = {}
        units = filler(rng, context.split, self.n_words, "natural") if self.n_words else []
        shares = np.array_split(np.arange(len(units)), len(order))
        for (chain, link), own in zip(order, shares, strict=True):
            for i in own:
                context.say(units[i])
            low, high = names[link][chain], names[link + 1][chain]
            told = f"The {LEVELS[link]} {low} is in the {LEVELS[link + 1]} {high}."
            if self.kind == "ordering":
                told = f"{low.title()} is taller than {high.title()}."
            refs[chain, link] = [context.say(told)]
        return refs

    def _cells(
        self, rng: np.random.Generator, context: Context, names: list[list[str]], order: list[tuple[int, int]]
    ) -> dict[tuple[int, int], list[Ref]]:
        refs: dict[tuple[int, int], list[Ref]] = {}
        for start in range(0, len(order), PER_BOARD):
            own, board = order[start : start + PER_BOARD], boards.blank(1, GRID)[0]
            places = pair_places(rng, len(own))
            for (chain, link), (row, column) in zip(own, places, strict=True):
                board[row, column : column + 2] = names[link][chain], names[link + 1][chain]
            number = context.show(board)
            for at, (row, column) in zip(own, places, strict=True):
                refs[at] = [context.cell(number, row, column + i) for i in (0, 1)]
        return refs

    def _contained(
        self, rng: np.random.Generator, names: list[list[str]], chain: int, refs: dict[tuple[int, int], list[Ref]]
    ) -> Turn:
        order = rng.permutation(CHAINS)
        options = [names[-1][int(i)].replace("-", " letter ") for i in order]
        letter = CHOICES[order.tolist().index(chain)]
        asked = f"In which building is the box {names[0][chain]}?"
        if self.shown == "image":
            start = names[0][chain].replace("-", " letter ")
            asked = f"Every letter leads to the letter right of it. Where do three steps from the {start} lead?"
        question = f"{asked} {lettered(options)} Answer with one letter, A to D."
        evidence = [ref for link in range(LINKS) for ref in refs[chain, link]]
        return Turn(question, letter, evidence, scorer="choice_letter", max_new_tokens=8, choices=options)

    def _taller(
        self, rng: np.random.Generator, names: list[list[str]], chain: int, refs: dict[tuple[int, int], list[Ref]]
    ) -> Turn:
        ends = names[0][chain].title(), names[-1][chain].title()
        yes = bool(rng.integers(2))
        above, below = ends if yes else ends[::-1]
        question = f"Is {above} taller than {below}? Answer yes or no."
        evidence = [ref for link in range(LINKS) for ref in refs[chain, link]]
        return Turn(question, "yes" if yes else "no", evidence, scorer="yes_no", max_new_tokens=8)

    def variant(self) -> str:
        """What is composed, how it is shown, and how much stands between."""
        return f"{self.kind}-{self.shown}-{self.n_words}w"
