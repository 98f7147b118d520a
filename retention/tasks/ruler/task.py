"""RULER as a task: one of its thirteen kinds, filled up to a length in tokens."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Example, Turn
from retention.tasks.context import Context
from retention.tasks.procedural import Check, Procedural
from retention.tasks.ruler.draft import Draft, Draw
from retention.tasks.ruler.facts import QA
from retention.tasks.ruler.frequency import common_words, frequent_words
from retention.tasks.ruler.niah import NIAH
from retention.tasks.ruler.variables import tracked
from retention.tasks.words import words_of

KINDS: dict[str, Callable[[Draw], Draft]] = {
    **NIAH,
    "vt": tracked,
    "cwe": common_words,
    "fwe": frequent_words,
    **QA,
}
SYMBOLIC = [name for name, kind in NIAH.items() if kind.asked == kind.values == 1]
"""Kinds that the embedded model's words can ask and answer."""


@dataclass
class Ruler(Procedural):
    """Text whose context and question, with room for the answer, take at most `n_tokens` tokens."""

    name: ClassVar[str] = "ruler"
    chance: ClassVar[float] = 0.0
    suite: ClassVar[bool] = True
    tiers: ClassVar[tuple[str, ...]] = ("symbolic",)
    positions: ClassVar[tuple[str, ...]] = ("before", "after")
    styles: ClassVar[tuple[str, ...]] = ("symbolic", "natural")

    tier: str = "symbolic"
    """There is text alone."""
    kind: str = "niah_single_1"
    """One of the thirteen: niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, niah_multiquery, vt, cwe, fwe, qa_1, qa_2."""
    n_tokens: int = 4096
    """Length to fill, the answer's tokens included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.units = 0
        self.measure: Callable[[Example], int] = words_of

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy."""
        return (
            *super().checks(),
            (self.kind in KINDS, f"task.kind among {', '.join(KINDS)}", self.kind),
            (self.n_tokens >= 64, "task.n_tokens of at least 64", self.n_tokens),
        )

    def measured(self, measure: Callable[[Example], int]) -> "Ruler":
        """This task with lengths in a model's tokens."""
        task = copy.copy(self)
        task.measure = measure
        return task

    def example(
        self, seed: int, split: str, index: int, *, style: str = "symbolic", n_turns: int | None = None
    ) -> Example:
        """The longest context that fits: more and more haystack around the same needles.

        Raises:
            ValueError: where the needles alone are too long, or the embedded model has no words for the kind.
        """
        if style == "symbolic" and self.kind not in SYMBOLIC:
            raise ValueError(f"expected model.prompt_style natural for ruler's {self.kind}, got symbolic")

        def filled(units: int) -> tuple[Example, int]:
            task = copy.copy(self)
            task.units = units
            made = super(Ruler, task).example(seed, split, index, style=style, n_turns=n_turns)
            return made, self.measure(made) + made.turns[0].max_new_tokens

        best, least = filled(0)
        if least > self.n_tokens:
            raise ValueError(f"expected task.n_tokens of at least {least} for ruler's {self.kind}, got {self.n_tokens}")
        low, high = 0, self._above(filled, least)
        while high - low > 1:
            middle = (low + high) // 2
            made, length = filled(middle)
            low, high = (middle, high) if length <= self.n_tokens else (low, middle)
            best = made if length <= self.n_tokens else best
        best.meta |= {"length_target": self.n_tokens, "units": low}
        return best

    def draw(self, rng: np.random.Generator, context: Context) -> list[Turn]:
        """The units of text, then the one question."""
        draft = KINDS[self.kind](Draw(rng, context.split, context.style, self.units, self.n_tokens))
        refs = [context.say(unit) for unit in draft.units]
        answer = draft.answers if len(draft.answers) > 1 else draft.answers[0]
        evidence = [refs[i] for i in draft.evidence]
        needs_all = self.kind not in ("cwe", "fwe")
        told = ", ".join(draft.answers)
        return [Turn(draft.question, answer, list(evidence), draft.scorer, draft.new_tokens, needs_all, told=told)]

    def variant(self) -> str:
        """Kind and length."""
        return f"{self.kind}-{self.n_tokens}"

    def _above(self, filled: Callable[[int], tuple[Example, int]], least: int) -> int:
        """Units that are too many: few more than the length of some lets expect."""
        units = 16
        while (length := filled(units)[1]) <= self.n_tokens:
            more = (self.n_tokens - least) * units / max(1, length - least)
            if length == least:  # there is nothing more to fill with
                return units
            units = max(units + 1, round(1.02 * more) + 1)
        return units
