"""Boards of keys with a digit to the right of each, and the question which digit that is: what several tasks vary."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Turn
from retention.tasks import boards
from retention.tasks.context import Context, Ref
from retention.tasks.procedural import Check, Procedural
from retention.tasks.scene import GRID, N_KEYS, key_name, pair_places

ORPHANS = 2
"""Most digits without a key per board of the hard tier."""


def key_words(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct keys such as `red-K`."""
    return ["-".join(key_name(int(key))) for key in rng.permutation(N_KEYS)[:count]]


def digit_turn(key: str, digit: str, refs: list[Ref], style: str) -> Turn:
    """Which digit is right of a key."""
    colour, letter = key.split("-")
    natural = f"Which digit is in the cell right of the {colour} letter {letter}? Answer with one digit."
    question = f"<ask> {key}" if style == "symbolic" else natural
    return Turn(question, digit, list(refs), max_new_tokens=1 if style == "symbolic" else 8)


@dataclass
class Keyed(Procedural):
    """`n_needles` key-digit pairs over `n_images` boards; `n_turns` distinct keys asked, one digit each."""

    chance: ClassVar[float] = 0.1
    styles: ClassVar[tuple[str, ...]] = ("symbolic", "natural")

    n_images: int = 16
    """Boards with pairs per context, each 4 x 4 cells."""
    n_needles: int = 24
    """Key-digit pairs per context, spread over the boards."""
    n_turns: int = 8
    """Questions per context."""

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy."""
        most = min(N_KEYS, 8 * self.n_images)
        asked = self.n_needles - (self.query_position == "deferred_turn")
        return (
            *super().checks(),
            (1 <= self.n_needles <= most, f"task.n_needles between 1 and {most}", self.n_needles),
            (1 <= self.n_turns <= asked, f"task.n_turns between 1 and {asked}", self.n_turns),
            (
                self.query_position != "before" or self.n_turns == 1,
                "task.n_turns of 1 with task.query_position before",
                self.n_turns,
            ),
        )

    @property
    def n_asked(self) -> int:
        """Scored turns per context."""
        return self.n_turns

    def draw(self, rng: np.random.Generator, context: Context) -> list[Turn]:
        """Boards in order, then turns about distinct keys in random order."""
        keys = key_words(rng, self.n_needles)
        shown, told = boards.blank(self.n_images, GRID), []
        for number, board in enumerate(shown):
            own = range(number, self.n_needles, self.n_images)
            for i, (row, column) in zip(own, pair_places(rng, len(own)), strict=True):
                digit = str(rng.integers(10))
                board[row, column : column + 2] = keys[i], digit
                told.append((keys[i], digit, number, row, column))
            self.distract(rng, board, [keys[i] for i in own], keys)
        order = rng.permutation(len(told))
        slots = self.show_all(rng, context, shown)
        turns = []
        for key, digit, number, row, column in (told[i] for i in order):
            refs = [context.cell(slots[number], row, column + i) for i in (0, 1)]
            turns.append(digit_turn(key, digit, refs, context.style))
        return turns

    def distract(self, rng: np.random.Generator, board: boards.Words, own: list[str], keys: list[str]) -> None:
        """Digits without a key, in the hard tier: never right of one, as all of those cells are taken."""
        if self.tier == "hard":
            count = min(int(rng.integers(ORPHANS + 1)), int((board == "").sum()))
            boards.scatter(rng, board, [str(digit) for digit in rng.integers(10, size=count)])

    def show_all(self, rng: np.random.Generator, context: Context, shown: boards.Words) -> list[int]:
        """Put the boards into the context; returns the number that each has there."""
        return [context.show(board) for board in shown]

    def variant(self) -> str:
        """Boards, pairs and turns."""
        return f"{self.n_images}x{self.n_needles}-{self.n_turns}t"
