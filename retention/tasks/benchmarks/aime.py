"""AIME 2024: thirty problems with whole numbers from 0 to 999 as answers; scores are means over several samples.

TRIM-KV (arXiv:2512.03324) draws 64 at temperature 0.6 and top_p 0.95: `samples: 64`, `temperature: 0.6`, `top_p: 0.95`.
"""

from dataclasses import dataclass
from typing import ClassVar

from retention.data.example import Turn
from retention.tasks.benchmarks.base import Row
from retention.tasks.benchmarks.math_500 import CUE
from retention.tasks.benchmarks.reasoning import ReasoningTask


@dataclass
class AIME(ReasoningTask):
    """A problem whose answer is a whole number."""

    name: ClassVar[str] = "aime"
    schema: ClassVar[dict[str, str]] = {"ID": "text", "Problem": "text", "Solution": "text", "Answer": "answer"}

    path: str = "Maxwell-Jia/AIME_2024"
    data_split: str = "train"
    max_new_tokens: int = 32_768

    def turn(self, row: Row) -> tuple[str, Turn]:
        """Numbers are compared by value: 033 is 33."""
        new, answer = self.max_new_tokens, str(row["Answer"])
        told = f"{row['Solution']} \\boxed{{{answer}}}"
        return row["Problem"], Turn(CUE, answer, scorer="math_equiv", max_new_tokens=new, told=told)
