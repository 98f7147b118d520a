"""The same needles in ever more that does not matter, in near-ties, or further apart: why does a full cache fall behind?

Three causes, one setting each: boards without needles add length, near-ties in blank cells compete, and stretched
positions put the same content beyond the distances a model was trained on. The needles do not depend on any of them.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from retention.data.example import Example
from retention.tasks import boards
from retention.tasks.context import Context
from retention.tasks.keyed import ORPHANS, Keyed
from retention.tasks.procedural import Check
from retention.tasks.scene import COLOURS, GRID


@dataclass
class Dilution(Keyed):
    """Keyed needles with `n_blank` boards that hold none, `n_ties` near-ties per board, at `stretch` times their positions."""

    name: ClassVar[str] = "dilution"

    n_blank: int = 16
    """Boards without needles, at random places between the others: the arm of length."""
    n_ties: int = 0
    """Letters of a board's keys in another colour, in its blank cells: the arm of ties."""
    stretch: float = 1.0
    """What rotary positions are multiplied by, the content staying what it is: the arm of position."""

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy."""
        cells = GRID * GRID
        crowded = 2 * -(-self.n_needles // max(1, self.n_images)) + self.n_ties + ORPHANS
        return (
            *super().checks(),
            (self.n_blank >= 0, "task.n_blank of 0 or more", self.n_blank),
            (self.n_ties >= 0, "task.n_ties of 0 or more", self.n_ties),
            (not self.n_ties or crowded <= cells, f"needles and ties of a board in at most {cells} cells", crowded),
            (self.stretch > 0, "task.stretch above 0", self.stretch),
        )

    def example(
        self, seed: int, split: str, index: int, *, style: str = "symbolic", n_turns: int | None = None
    ) -> Example:
        """One context with its turns, grouped by what dilutes it."""
        drawn = super().example(seed, split, index, style=style, n_turns=n_turns)
        meta = drawn.meta | {"groups": {"cause": " ".join(self.causes()) or "none"}}
        return replace(drawn, meta=meta, stretch=self.stretch)

    def causes(self) -> list[str]:
        """The arms that these settings are in."""
        arms = (
            (self.n_blank > 0, f"length +{self.n_blank}"),
            (self.n_ties > 0, f"ties +{self.n_ties}"),
            (self.stretch != 1, f"position x{self.stretch:g}"),
        )
        return [name for holds, name in arms if holds]

    def show_all(self, rng: np.random.Generator, context: Context, shown: boards.Words) -> list[int]:
        """The boards in order, ties added, those without needles at random places between them."""
        keys = {str(word) for word in shown.flat if "-" in word}
        for board in shown:
            boards.scatter(rng, board, self._ties(rng, [str(w) for w in board.flat if "-" in w], keys))
        slots = sorted(rng.permutation(len(shown) + self.n_blank)[: len(shown)].tolist())
        for number in range(len(shown) + self.n_blank):
            context.show(shown[slots.index(number)] if number in slots else boards.blank(1, GRID)[0])
        return slots

    def variant(self) -> str:
        """Boards, pairs, turns and what dilutes them."""
        return f"{super().variant()}-{self.n_blank}b{self.n_ties}n{self.stretch:g}x"

    def _ties(self, rng: np.random.Generator, own: list[str], keys: set[str]) -> list[str]:
        """Letters of the board's keys in colours of keys, but none that is a key of the context; a decoy where all are."""
        found = []
        for i in rng.integers(len(own), size=self.n_ties) if own else ():
            letter = own[int(i)][-1]
            free = [f"{colour}-{letter}" for colour in COLOURS if f"{colour}-{letter}" not in keys]
            found.append(free[int(rng.integers(len(free)))] if free else "<decoy0>")
        return found
