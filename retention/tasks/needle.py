"""One needle at a chosen depth: a sentence, a pair of cells in an image, or the image that shows what is asked for.

What is asked for is named (`index`), or shown in one more image that comes as a second prompt (`match`).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Turn
from retention.tasks import boards
from retention.tasks.context import Context, Ref
from retention.tasks.filler import filler
from retention.tasks.keyed import digit_turn, key_words
from retention.tasks.procedural import Check, Procedural
from retention.tasks.scene import GRID, pair_places
from retention.tasks.scorers.choice import LETTERS as ALPHABET

KINDS = ("text", "image", "index", "match")
INDEXED = ("index", "match")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
COPIES = 4
"""Cells of an image that show its class."""


@dataclass
class Needle(Procedural):
    """A key with its digit in text or in an image among keys of the same form; or which image shows a shape."""

    name: ClassVar[str] = "needle"
    chance: ClassVar[float] = 0.1
    styles: ClassVar[tuple[str, ...]] = ("symbolic", "natural")

    kind: str = "image"
    """text, image, index or match."""
    n_images: int = 16
    """Images of 4 x 4 cells."""
    n_words: int = 0
    """Words of filler spread between the images."""
    n_distractor_keys: int = 3
    """Needles of the same form with other keys (text, image)."""
    depth: float | None = None
    """Where in the context the needle lies, 0 to 1; null draws one of 0, .25, .5, .75 and 1."""

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy."""
        most = {"index": min(len(boards.MARKS), 40), "match": len(ALPHABET)}.get(self.kind)
        return (
            *super().checks(),
            (self.kind in KINDS, f"task.kind among {', '.join(KINDS)}", self.kind),
            (
                2 <= self.n_images <= (most or self.n_images),
                f"task.n_images between 2 and {most}" if most else "task.n_images of at least 2",
                self.n_images,
            ),
            (self.n_words >= 0, "task.n_words of 0 or more", self.n_words),
            (1 <= self.n_distractor_keys <= 60, "task.n_distractor_keys between 1 and 60", self.n_distractor_keys),
            (self.depth is None or 0 <= self.depth <= 1, "task.depth between 0 and 1", self.depth),
            (
                self.depth is None or self.kind not in INDEXED,
                f"task.depth of null for kind {self.kind}, where it would be the answer",
                self.depth,
            ),
            (
                self.kind != "match" or self.query_position == "after",
                "task.query_position among after for kind match, whose question refers to an image behind the context",
                self.query_position,
            ),
        )

    @property
    def guess(self) -> float:
        """One digit in ten, or one image of all."""
        return 1 / self.n_images if self.kind in INDEXED else self.chance

    def draw(self, rng: np.random.Generator, context: Context) -> list[Turn]:
        """The context, then the turn about the needle and one about a distractor."""
        if self.kind in INDEXED:
            return self._indexed(rng, context)
        depth = DEPTHS[int(rng.integers(len(DEPTHS)))] if self.depth is None else self.depth
        place = round(depth * (self.n_images - 1))
        keys = key_words(rng, 1 + self.n_distractor_keys)
        digits = [str(digit) for digit in rng.integers(10, size=len(keys))]
        others = [int(i) for i in rng.permutation(np.setdiff1d(np.arange(self.n_images), [place]))]
        where = [place, *(others[i % len(others)] for i in range(self.n_distractor_keys))]
        units = filler(rng, context.split, self.n_words, context.style) if self.n_words else []
        shares = np.array_split(np.arange(len(units)), self.n_images)
        turns: dict[int, Turn] = {}
        for image in range(self.n_images):
            own = [i for i, at in enumerate(where) if at == image]
            board = boards.blank(1, GRID)[0]
            places = pair_places(rng, len(own)) if self.kind == "image" else []
            for i, (row, column) in zip(own, places, strict=False):
                board[row, column : column + 2] = keys[i], digits[i]
            number = context.show(board)
            for i, (row, column) in zip(own, places, strict=False):
                refs: list[Ref] = [context.cell(number, row, column + k) for k in (0, 1)]
                turns[i] = digit_turn(keys[i], digits[i], refs, context.style)
            between = shares[image].tolist()
            before = int(rng.integers(len(between) + 1))
            for unit in between[:before]:
                context.say(units[unit])
            for i in own if self.kind == "text" else ():
                turns[i] = _told(keys[i], digits[i], context)
            for unit in between[before:]:
                context.say(units[unit])
        return [turns[i] for i in range(len(keys))]

    def _indexed(self, rng: np.random.Generator, context: Context) -> list[Turn]:
        """Images of distinct coloured shapes, then which of them is asked for: in words, or by one more image."""
        if context.style == "symbolic":
            raise ValueError(
                f"expected model.prompt_style natural for needle with task.kind {self.kind}, got {context.style}"
            )
        classes = [boards.MARKS[int(i)] for i in rng.permutation(len(boards.MARKS))[: self.n_images]]
        for mark in classes:
            context.show(_pictured(rng, mark))
        asked = rng.permutation(self.n_images)[:2].tolist()
        return (
            self._named(context, classes, asked)
            if self.kind == "index"
            else self._shown(rng, context, classes, asked[0])
        )

    def _named(self, context: Context, classes: list[str], asked: list[int]) -> list[Turn]:
        """Shapes by their names, images by their numbers."""
        found = []
        for image in asked:
            what = " ".join(classes[image].split("-"))
            question = f"Pictures are numbered from 1. Which picture shows the {what}? Answer with its number."
            found.append(Turn(question, str(image + 1), context.cells(image), max_new_tokens=8, needs_all=False))
        return found

    def _shown(self, rng: np.random.Generator, context: Context, classes: list[str], image: int) -> list[Turn]:
        """A shape by another drawing of it, in a second prompt, and images by letters."""
        context.end_prompt()
        context.say("One more picture:")
        context.show(_pictured(rng, classes[image]))
        letters = ALPHABET[: self.n_images]
        question = (
            f"The pictures before the last one have the letters {letters[0]} to {letters[-1]} in their order. Which of "
            "them shows the same shape in the same colour as the last one? Answer with its letter."
        )
        choices = [f"picture {letter}" for letter in letters]
        evidence = context.cells(image)
        return [Turn(question, letters[image], evidence, "choice_letter", 8, needs_all=False, choices=choices)]

    def variant(self) -> str:
        """Kind, images, words, distractors and depth."""
        at = "any" if self.depth is None else f"{self.depth:g}"
        return f"{self.kind}-{self.n_images}x{self.n_words}w-{self.n_distractor_keys}d-at{at}"


def _pictured(rng: np.random.Generator, mark: str) -> boards.Words:
    """A board that shows a coloured shape several times, at random places."""
    board = boards.blank(1, GRID)[0]
    boards.scatter(rng, board, [mark] * COPIES)
    return board


def _told(key: str, digit: str, context: Context) -> Turn:
    """Say a key's digit in the context and ask for it."""
    if context.style == "symbolic":
        return Turn(f"<ask> {key}", digit, [context.say(f"{key} {digit}")])
    colour, letter = key.split("-")
    ref = context.say(f"The {colour} letter {letter} has the digit {digit}.")
    question = f"Which digit does the {colour} letter {letter} have? Answer with one digit."
    return Turn(question, digit, [ref], scorer="token_in_split", max_new_tokens=8)
