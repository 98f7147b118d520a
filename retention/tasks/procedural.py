"""What the procedural tasks share: tiers, where the question stands, and how a drawn context becomes an example."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from retention.data.example import QUERY_POSITIONS, Example, Segment, Turn
from retention.tasks.base import Task
from retention.tasks.context import Context
from retention.tasks.depth import depths
from retention.types import require

TIERS = ("symbolic", "rendered", "hard")
Check = tuple[bool, str, object]
"""Whether a setting holds, what is expected, what came."""
CUES = {"symbolic": "<ask>", "natural": "Answer:"}


@dataclass
class Procedural(Task):
    """Draws a context and its turns from a seed; a change of what it draws raises `version`."""

    version: ClassVar[int] = 1
    tiers: ClassVar[tuple[str, ...]] = TIERS
    positions: ClassVar[tuple[str, ...]] = QUERY_POSITIONS
    styles: ClassVar[tuple[str, ...]] = ("natural",)
    """Wordings; `symbolic` where the embedded model's vocabulary can ask and answer."""
    independent: ClassVar[bool] = False
    """Whether every turn is asked on its own, of the same evicted cache."""
    evicts_answers: ClassVar[bool] = False
    """Whether the budget holds while answers are written."""

    tier: str = "hard"
    """symbolic (cells as words), rendered (plain pictures) or hard (textured ground, decoys)."""
    query_position: str = "after"
    """before the context, after it, or in a deferred_turn: after a question about something else."""
    cell_px: int = 8
    """Pixels per cell: 8 for the embedded model, patch x merge (28 or 32) for others."""

    def __post_init__(self) -> None:
        require(self.checks())

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy: (holds, expected, got)."""
        return (
            (self.tier in self.tiers, f"task.tier among {', '.join(self.tiers)} for {self.name}", self.tier),
            (
                self.query_position in self.positions,
                f"task.query_position among {', '.join(self.positions)} for {self.name}",
                self.query_position,
            ),
            (self.cell_px >= 8, "task.cell_px of at least 8", self.cell_px),
        )

    @abstractmethod
    def draw(self, rng: np.random.Generator, context: Context) -> list[Turn]:
        """Fill the context; the turns to ask, and behind them one about something else if turns may be deferred."""

    @abstractmethod
    def variant(self) -> str:
        """The settings that ids name."""

    def paired(self) -> str | None:
        """The settings that a context has in common with the one it is compared with; None where it stands alone.

        Both are one cluster, and a group in what they tell says which is which.
        """
        return None

    @property
    def n_asked(self) -> int:
        """Scored turns per context."""
        return 1

    @property
    def guess(self) -> float:
        """Score of a guess under these settings."""
        return self.chance

    def example(
        self, seed: int, split: str, index: int, *, style: str = "symbolic", n_turns: int | None = None
    ) -> Example:
        """One context with its turns.

        Raises:
            ValueError: for a style that the task cannot be worded in.
        """
        if style not in self.styles:
            raise ValueError(
                f"expected model.prompt_style natural for {self.name}, whose questions the embedded model has no words for, got {style}"
            )
        rng = self.rng(seed, split, index)
        context = Context(rng, tier=self.tier, style=style, split=split, cell_px=self.cell_px)
        drawn = [replace(turn, cue=CUES[style]) for turn in self.draw(rng, context)]
        turns = self.arranged(drawn, self.n_asked if n_turns is None else n_turns)
        segments, later = context.finish()
        dialogue = len(turns) > 1 and not self.independent
        position = "deferred_turn" if dialogue and self.query_position == "after" else self.query_position
        place = f"{self.tier}/{split}/{seed}/{index}"
        pair = self.paired()
        cluster = {} if pair is None else {"cluster": f"{self.name}/{pair}/{place}"}
        return Example(
            id=f"{self.name}/v{self.version}-{self.variant()}-{self.query_position}/{place}",
            segments=segments,
            turns=turns,
            query_position=position,
            meta=self._meta(context, segments, turns) | cluster,
            asked_behind=context.asked_behind,
            later=later,
            independent=self.independent,
            evicts_answers=self.evicts_answers,
        )

    def arranged(self, drawn: list[Turn], count: int) -> list[Turn]:
        """Drawn turns in the order they are asked; a deferred one comes after the last drawn, which is not scored."""
        asked = drawn[: min(count, self.n_asked)]
        if self.query_position != "deferred_turn":
            return asked
        assert len(drawn) > self.n_asked
        return [replace(drawn[-1], scored=False), *asked]

    def _meta(self, context: Context, segments: list[Segment], turns: list[Turn]) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "version": self.version,
            "variant": self.variant(),
            "tier": self.tier,
            "chance": self.guess,
            "n_images": context.n_boards,
        }
        if context.n_boards:
            meta |= {"grid": context.grid, "bg_frac": round(context.blank_share, 4)}
        return meta | {"depth": depths(turns, segments)} | context.told
