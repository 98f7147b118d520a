"""The interface of every task: seeded examples with turns, evidence and a chance level."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Example

SPLITS = ("train", "val", "test")


@dataclass
class Task(ABC):
    """Generates examples; example i of a split does not depend on how many others are drawn."""

    name: ClassVar[str]
    chance: ClassVar[float]

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

    def rng(self, seed: int, split: str, index: int) -> np.random.Generator:
        """The randomness of one example: from its seed, task, split and index only."""
        entropy = [seed, zlib.crc32(self.name.encode()), SPLITS.index(split), index]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
