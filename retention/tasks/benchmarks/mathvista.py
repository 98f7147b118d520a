"""MathVista (Lu et al., 2024, arXiv:2310.02255): mathematics in pictures. CC BY-SA 4.0.

The authors let a language model extract answers before they are compared; here rules extract them, so that scores are
not comparable with theirs and rows say so.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Example, Turn
from retention.tasks.benchmarks.base import DatasetTask, Row
from retention.tasks.benchmarks.wording import choice_turn

BOXED = "Reason step by step and put the final answer in \\boxed{}."


@dataclass
class MathVista(DatasetTask):
    """A picture and a question, with options or a number, text or list as answer."""

    name: ClassVar[str] = "mathvista"
    comparable: ClassVar[bool] = False
    schema: ClassVar[dict[str, str]] = {
        "pid": "text",
        "question": "text",
        "image": "text",
        "decoded_image": "image",
        "choices": "texts?",
        "unit": "text?",
        "precision": "number?",
        "answer": "text",
        "question_type": "text",
        "answer_type": "text",
        "metadata": "record",
        "query": "text",
    }

    path: str = "AI4Math/MathVista"
    data_split: str = "testmini"
    max_new_tokens: int = 512
    """Longest answer."""

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """The picture, then the question."""
        if row["choices"]:
            cue = "Reason step by step and end with the letter of the right option in brackets."
            turn = choice_turn(row["question"], row["choices"], row["answer"], new=self.max_new_tokens, cue=cue)
        else:
            unit = f" (in {row['unit']})" if row["unit"] else ""
            text, new = f"{row['question']}{unit}\n{BOXED}", self.max_new_tokens
            turn = Turn(text, row["answer"], scorer="math_equiv", max_new_tokens=new)
        groups = {"type": row["question_type"], "task": str(row["metadata"].get("task"))}
        return Example("", [self.picture(row["decoded_image"])], [turn], "after", {"groups": groups})
