"""Benchmarks that are several sets: one of them, or many in one evaluation, whose plain mean stands among the groups."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from retention.data.example import Example
from retention.tasks.benchmarks.base import DatasetTask
from retention.types import require

EVERY = "all"


@dataclass
class SetsTask(DatasetTask):
    """One set, named by the setting `names_set`, or those of `sets`, a row of each in turn."""

    names_set: ClassVar[str] = "subset"

    sets: list[str] = field(default_factory=list)
    """Sets that are evaluated together, each with `limit` rows, or `[all]`; none takes the one that is named."""

    def __post_init__(self) -> None:
        super().__post_init__()
        several = not (self.sets and Path(self.path).is_file())
        require([(several, f"task.{self.name}.path to be a hub id or a folder for several sets", self.path)])
        for name in self.sets:
            if name != EVERY:
                self._alone(name)

    @abstractmethod
    def known(self) -> Sequence[str]:
        """Every set of the benchmark."""

    def _alone(self, name: str) -> "SetsTask":
        changed: dict[str, Any] = {self.names_set: name, "sets": []}
        return replace(self, **changed)

    @cached_property
    def members(self) -> list["SetsTask"]:
        """One task for each of the sets."""
        return [self._alone(name) for name in (self.known() if EVERY in self.sets else dict.fromkeys(self.sets))]

    def places(self, seed: int, split: str) -> list[tuple[int, int]]:
        """Set and index of every example: the first of each set, then the second of each that has one."""
        counts = [len(member.numbers(seed, split)) for member in self.members]
        return sorted(((s, i) for s, count in enumerate(counts) for i in range(count)), key=lambda place: place[::-1])

    def numbers(self, seed: int, split: str) -> list[int]:
        """Numbers of the rows of a split; over several sets, of the examples in their order."""
        return list(range(len(self.places(seed, split)))) if self.sets else super().numbers(seed, split)

    def example(
        self, seed: int, split: str, index: int, *, style: str = "natural", n_turns: int | None = None
    ) -> Example:
        """The row at a place of the order, of whichever set has it."""
        if not self.sets:
            return super().example(seed, split, index, style=style, n_turns=n_turns)
        places = self.places(seed, split)
        if not 0 <= index < len(places):
            raise ValueError(f"{self.name} has {len(places)} rows of split {split} in its sets, got index {index}")
        member, own = places[index]
        return self.members[member].example(seed, split, own, style=style, n_turns=n_turns)
