"""Collects what a context shows, in order, and tells where each piece of it came to stand.

Boards are painted (tiers `rendered` and `hard`) or written as words, one per cell (tier `symbolic`).
"""

from typing import Any

import numpy as np

from retention.data.example import EvidenceRef, Segment, TextRef
from retention.embedded import DECOYS
from retention.tasks import boards

Ref = EvidenceRef | TextRef
BLANKS = {"symbolic": "<blank>", "natural": "."}


class Context:
    """The segments of one context while it is being drawn."""

    def __init__(self, rng: np.random.Generator, *, tier: str, style: str, split: str, cell_px: int) -> None:
        self.rng, self.tier, self.style, self.split, self.cell_px = rng, tier, style, split, cell_px
        self.still = False
        """Whether all boards share one ground, as frames of a camera that does not move."""
        self.told: dict[str, Any] = {}
        """What `meta` says of the context beside what it says of all."""
        self.asked_behind = 0
        """Segments before the question, where it stands among them."""
        self._prompt: tuple[int, int] | None = None
        self._segments: list[Segment] = []
        self._text: list[str] = []
        self._length = 0
        self._boards: list[boards.Words] = []
        self._cells: dict[tuple[int, int, int], Ref] = {}

    @property
    def n_boards(self) -> int:
        """Boards of the context, without those of a second prompt."""
        return len(self._boards) if self._prompt is None else self._prompt[1]

    @property
    def grid(self) -> int:
        """Cells per side of every board."""
        return len(self._boards[0])

    @property
    def blank_share(self) -> float:
        """Share of the boards' cells that show nothing."""
        return float(np.mean(np.stack(self._boards[: self.n_boards]) == ""))

    def ask_here(self) -> None:
        """Let the question stand behind what was shown and said so far."""
        self._close()
        self.asked_behind = len(self._segments)

    def end_prompt(self) -> None:
        """Let what is shown and said from here on be a second prompt."""
        self._close()
        self._prompt = len(self._segments), len(self._boards)

    def say(self, text: str) -> TextRef:
        """Add text; returns where it stands."""
        if not self._text:
            self._segments.append(Segment("text", ""))
            self._length = -1
        start = self._length + 1
        self._text.append(text)
        self._length = start + len(text)
        return TextRef(len(self._segments) - 1, start, self._length)

    def show(self, board: boards.Words, *, decoys: bool = True) -> int:
        """Add a board; returns its number. In tier `hard` decoys are put into its blank cells, where they may be."""
        number, board = len(self._boards), board.copy()
        if decoys and self.tier == "hard":
            boards.decoyed(self.rng, board)
        self._boards.append(board)
        if self.tier == "symbolic":
            self._write(number, board)
            return number
        self._close()
        self._segments.append(Segment("image", None))
        for row, column in np.ndindex(*board.shape):
            self._cells[number, row, column] = EvidenceRef(number, row, column)
        return number

    def cell(self, board: int, row: int, column: int) -> Ref:
        """Where one cell of a board stands."""
        return self._cells[board, row, column]

    def cells(self, board: int) -> list[Ref]:
        """Where all cells of a board stand, row by row."""
        return [ref for (number, _, _), ref in self._cells.items() if number == board]

    def finish(self) -> tuple[list[Segment], list[Segment]]:
        """The segments of the context and those of a second prompt, boards painted."""
        self._close()
        places = [segment for segment in self._segments if segment.kind == "image"]
        if places:
            words = np.stack(self._boards)
            images = boards.paint(self.rng, words, split=self.split, textured=self.tier == "hard", still=self.still)
            for segment, image in zip(places, images, strict=True):
                segment.payload = boards.scaled(image, self.cell_px)
        end = len(self._segments) if self._prompt is None else self._prompt[0]
        return self._segments[:end], self._segments[end:]

    def _write(self, number: int, board: boards.Words) -> None:
        """A board as words, row by row, between what marks its two ends."""
        ends = ("<img>", "</img>") if self.style == "symbolic" else (f"[picture {number + 1}:", "]")
        self.say(ends[0])
        for row, column in np.ndindex(*board.shape):
            if self.style == "natural" and row and not column:
                self.say("/")
            self._cells[number, row, column] = self.say(self._word(str(board[row, column])))
        self.say(ends[1])

    def _word(self, word: str) -> str:
        if not word:
            return BLANKS[self.style]
        decoy = word.startswith("<decoy") and self.style == "natural"
        return DECOYS[int(word[6:-1])] if decoy else word

    def _close(self) -> None:
        if self._text:
            self._segments[-1].payload = " ".join(self._text)
        self._text = []
