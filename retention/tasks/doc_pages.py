"""Pages of text as pictures, the same keys on all of them with other values: what does the page of that title say?

Evidence is dense: a value is several cells, and one that is lost spoils the word.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Turn
from retention.tasks import boards
from retention.tasks.context import Context, Ref
from retention.tasks.names import coined
from retention.tasks.procedural import Check, Procedural

SIDE, KEY, VALUE = 9, 3, 5
POINTER = "SEE"
MOST_ROWS = SIDE - 3
"""Rows below the title and a blank one, less the pointer's."""


@dataclass
class DocPages(Procedural):
    """`n_pages` pages of 9 x 9 letters: a title, then rows of a key and its value, one of which names another page."""

    name: ClassVar[str] = "doc_pages"
    chance: ClassVar[float] = 0.0

    n_pages: int = 6
    """Pages per context; each is an image."""
    n_rows: int = 4
    """Keys per page, the same on every page."""
    hops: int = 1
    """1: the page is named; 2: a row of the page that is named names the page meant."""
    n_turns: int = 2
    """Questions per context, about different pages."""

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy."""
        pages = self.hops * (self.n_turns + (self.query_position == "deferred_turn"))
        return (
            *super().checks(),
            (1 <= self.n_rows <= MOST_ROWS, f"task.n_rows between 1 and {MOST_ROWS}", self.n_rows),
            (self.hops in (1, 2), "task.hops of 1 or 2", self.hops),
            (self.n_turns >= 1, "task.n_turns of at least 1", self.n_turns),
            (self.n_pages >= max(2, pages), f"task.n_pages of at least {max(2, pages)}", self.n_pages),
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
        """The pages, then turns about pages that no other turn needs."""
        titles = [word.upper() for word in coined(rng, context.split, self.n_pages)]
        keys = [word.upper() for word in coined(rng, context.split, self.n_rows, 1)]
        order = rng.permutation(self.n_pages).tolist()
        leads = {page: order[(i + 1) % len(order)] for i, page in enumerate(order)}
        values = [[word.upper() for word in coined(rng, context.split, self.n_rows)] for _ in titles]
        rows: list[dict[str, int]] = []
        for page, title in enumerate(titles):
            board = boards.blank(1, SIDE)[0]
            board[0, :VALUE] = list(title)
            at = {key: 2 + int(i) for key, i in zip([*keys, POINTER], rng.permutation(self.n_rows + 1), strict=True)}
            for key, value in zip([*keys, POINTER], [*values[page], titles[leads[page]]], strict=True):
                board[at[key], :KEY], board[at[key], KEY + 1 : KEY + 1 + VALUE] = list(key), list(value)
            context.show(board)
            rows.append(at)
        turns = []
        for number in range(self.n_turns + (self.query_position == "deferred_turn")):
            first = order[number * self.hops]
            last, asked = (first if self.hops == 1 else leads[first]), int(rng.integers(self.n_rows))
            place = f"on the page titled {titles[first]}"
            if self.hops == 2:
                place = f"on the page that the page titled {titles[first]} names behind {POINTER}"
            refs = _row(context, last, 0, 0) + _row(context, last, rows[last][keys[asked]], KEY + 1)
            if self.hops == 2:
                refs += _row(context, first, 0, 0) + _row(context, first, rows[first][POINTER], KEY + 1)
            question = f"What is written behind {keys[asked]} {place}? Answer with that word."
            turns.append(Turn(question, values[last][asked], refs, scorer="anls", max_new_tokens=16))
        return turns

    def variant(self) -> str:
        """Pages, rows, hops and turns."""
        return f"{self.n_pages}x{self.n_rows}-{self.hops}h-{self.n_turns}t"


def _row(context: Context, page: int, row: int, start: int) -> list[Ref]:
    """The letters of a title, or of a key and the value behind it."""
    return [context.cell(page, row, column) for column in range(start + VALUE) if column != KEY or not start]
