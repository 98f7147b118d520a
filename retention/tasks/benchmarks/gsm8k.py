"""GSM8K (Cobbe et al., 2021, arXiv:2110.14168): word problems whose answer is a number. MIT.

Without examples, or behind `shots` worked problems, the first of the training split; published figures of eight shots
mostly use the eight of Wei et al. (2022, arXiv:2201.11903) instead.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from retention.data.example import Turn
from retention.tasks.benchmarks.base import Row
from retention.tasks.benchmarks.reasoning import ReasoningTask
from retention.types import require

CUE = 'Reason step by step and end with a line "#### <number>".'


@dataclass
class GSM8K(ReasoningTask):
    """A word problem."""

    name: ClassVar[str] = "gsm8k"
    schema: ClassVar[dict[str, str]] = {"question": "text", "answer": "text"}

    path: str = "openai/gsm8k"
    subset: str | None = "main"
    max_new_tokens: int = 512
    shots: int = 0
    """Worked problems before the one that is asked, as part of the context."""
    shots_path: str | None = None
    """Where they come from: a hub id, a file or a folder; null is the split train of `path`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        apart = self.shots == 0 or self._training.source != self.source
        require(
            [
                (self.shots >= 0, "task.gsm8k.shots of 0 or more", self.shots),
                (apart, "task.gsm8k.shots_path for shots from other rows than those that are asked", self.shots_path),
            ]
        )

    @property
    def part(self) -> str:
        """Subset, and how many problems are shown."""
        return f"{super().part}-{self.shots}shots" if self.shots else super().part

    @property
    def _training(self) -> "GSM8K":
        return replace(self, path=self.shots_path or self.path, data_split="train", shots=0)

    @cached_property
    def worked(self) -> str:
        """The worked problems, without the marks of a calculator that their solutions have.

        Raises:
            ValueError: where there are fewer.
        """
        rows = self._training.rows
        require([(len(rows) >= self.shots, f"task.gsm8k.shots of at most {len(rows)}", self.shots)])
        shown = (rows[i] for i in range(self.shots))
        return "".join(
            f"Problem: {row['question']}\nSolution: {re.sub(r'<<[^>]*>>', '', row['answer'])}\n\n" for row in shown
        )

    def turn(self, row: Row) -> tuple[str, Turn]:
        """The number stands behind #### in the answer, which is a solution."""
        answer = row["answer"].rpartition("####")[2].strip()
        problem = f"{self.worked}Problem: {row['question']}" if self.shots else row["question"]
        return problem, Turn(CUE, answer, scorer="numeric", max_new_tokens=self.max_new_tokens, told=row["answer"])
