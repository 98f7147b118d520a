"""GSM8K (Cobbe et al., 2021, arXiv:2110.14168): word problems whose answer is a number; without examples. MIT."""

from dataclasses import dataclass
from typing import ClassVar

from retention.data.example import Turn
from retention.tasks.benchmarks.base import Row
from retention.tasks.benchmarks.reasoning import ReasoningTask

CUE = 'Reason step by step and end with a line "#### <number>".'


@dataclass
class GSM8K(ReasoningTask):
    """A word problem."""

    name: ClassVar[str] = "gsm8k"
    schema: ClassVar[dict[str, str]] = {"question": "text", "answer": "text"}

    path: str = "openai/gsm8k"
    subset: str | None = "main"
    max_new_tokens: int = 512

    def turn(self, row: Row) -> tuple[str, Turn]:
        """The number stands behind #### in the answer, which is a solution."""
        answer = row["answer"].rpartition("####")[2].strip()
        return row["question"], Turn(
            CUE, answer, scorer="numeric", max_new_tokens=self.max_new_tokens, told=row["answer"]
        )
