"""The interface of every task: seeded examples with turns, evidence and a chance level."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from retention.data.example import Example
from retention.tasks.further import Row, companions

SPLITS = ("train", "val", "test")


@dataclass
class Task(ABC):
    """Generates examples; example i of a split does not depend on how many others are drawn."""

    name: ClassVar[str]
    chance: ClassVar[float]
    suite: ClassVar[bool] = False
    """Whether presets are the parts of one benchmark, whose score is their plain mean."""

    @abstractmethod
    def example(
        self, seed: int, split: str, index: int, *, style: str = "symbolic", n_turns: int | None = None
    ) -> Example:
        """One context with its turns, worded in the given style; `n_turns` overrides the task's own."""

    def available(self, split: str, wanted: int) -> int:
        """How many of the wanted examples there are: all of them, where they are made."""
        return wanted

    def measured(self, measure: Callable[[Example], int]) -> "Task":
        """The task with lengths in a model's tokens, as `measure` counts them; tasks without a length stay as they are."""
        return self

    @classmethod
    def further(cls, rows: Sequence[Row]) -> dict[str, float]:
        """What the rows of one setting (policy, budget, protocol) tell besides their mean score, by name.

        Rows of all presets of the task may be among them: an example's id begins with the task's name. What cannot be
        told from them is left out.
        """
        return companions(rows)

    def judged(self, rows: Sequence[Row]) -> list[Row]:
        """Answers with the scores of whoever judges them; here they stay as scorers have them."""
        return list(rows)

    def provenance(self, seed: int, split: str, wanted: int) -> dict[str, Any]:
        """What the manifest says of the task's first `wanted` examples beside its settings."""
        return {}

    def rng(self, seed: int, split: str, index: int) -> np.random.Generator:
        """The randomness of one example: from its seed, task, split and index only."""
        entropy = [seed, zlib.crc32(self.name.encode()), SPLITS.index(split), index]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
