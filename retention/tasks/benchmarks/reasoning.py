"""Problems with long solutions: what they measure is a budget that holds while the solution is written."""

import zlib
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from retention.data.example import Example, Sampling, Segment, Turn
from retention.tasks.benchmarks.base import DatasetTask, Row
from retention.types import require


@dataclass
class ReasoningTask(DatasetTask):
    """One problem; question and solution count inside the budget (`cache.evict_every`), and it may be asked several times."""

    max_new_tokens: int = 4096
    """Longest solution; rows tell which were cut off."""
    samples: int = 1
    """Solutions per problem, whose scores are averaged; one problem is one cluster."""
    temperature: float | None = None
    """At which tokens are drawn; null takes the likeliest."""
    top_p: float = 1.0
    """Share of the likeliest tokens that are drawn from."""
    decode_budget: bool = True
    """Evict while the solution is written; false holds it on top of the budget of the problem."""

    def __post_init__(self) -> None:
        super().__post_init__()
        many = self.samples == 1 or self.temperature is not None
        require(
            [
                (self.samples >= 1, f"task.{self.name}.samples of at least 1", self.samples),
                (many, f"task.{self.name}.temperature for several samples", self.temperature),
                (self.max_new_tokens >= 1, f"task.{self.name}.max_new_tokens of at least 1", self.max_new_tokens),
            ]
        )
        if self.temperature is not None:
            Sampling(self.temperature, self.top_p)

    @abstractmethod
    def turn(self, row: Row) -> tuple[str, Turn]:
        """The problem, and what is asked about it."""

    def numbers(self, seed: int, split: str) -> list[int]:
        """Row numbers, each as often as it is asked."""
        return [number for number in super().numbers(seed, split) for _ in range(self.samples)]

    def example(
        self, seed: int, split: str, index: int, *, style: str = "natural", n_turns: int | None = None
    ) -> Example:
        """The problem at a place of the order, for its next sample."""
        found = super().example(seed, split, index, style=style, n_turns=n_turns)
        sample = index % self.samples
        meta = found.meta | {"cluster": found.id}
        drawn = None
        if self.temperature is not None:
            drawn = Sampling(self.temperature, self.top_p, zlib.crc32(f"{found.id}/{seed}/{sample}".encode()))
        return replace(found, id=f"{found.id}/{sample}", meta=meta, sampling=drawn)

    def provenance(self, seed: int, split: str, wanted: int) -> dict[str, Any]:
        """The seed that each solution is drawn by, where it is drawn."""
        told = super().provenance(seed, split, wanted)
        if self.temperature is None:
            return told
        drawn = (self.example(seed, split, i) for i in range(self.available(split, wanted)))
        return told | {"sampling_seeds": {e.id: e.sampling.seed for e in drawn if e.sampling is not None}}

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """The problem as context, then how to answer."""
        problem, turn = self.turn(row)
        context = [Segment("text", f"{problem}\n\n")]
        return Example("", context, [turn], "after", evicts_answers=self.decode_budget)
