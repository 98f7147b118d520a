"""MATH-500 (Lightman et al., 2023, arXiv:2305.20050): 500 problems of MATH (Hendrycks et al., 2021). MIT."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Example, Turn
from retention.tasks.benchmarks.base import Row
from retention.tasks.benchmarks.reasoning import ReasoningTask

CUE = "Reason step by step and put the final answer in \\boxed{}."


@dataclass
class MATH500(ReasoningTask):
    """A problem whose answer is an expression, compared by value."""

    name: ClassVar[str] = "math_500"
    schema: ClassVar[dict[str, str]] = {
        "problem": "text",
        "solution": "text",
        "answer": "text",
        "subject": "text",
        "level": "integer",
        "unique_id": "text",
    }

    path: str = "HuggingFaceH4/MATH-500"

    def turn(self, row: Row) -> tuple[str, Turn]:
        """The answer is what the solution boxes."""
        new = self.max_new_tokens
        return row["problem"], Turn(CUE, row["answer"], scorer="math_equiv", max_new_tokens=new, told=row["solution"])

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """With subject and level to group by."""
        found = super().build(row, rng)
        found.meta["groups"] = {"subject": row["subject"], "level": row["level"]}
        return found
