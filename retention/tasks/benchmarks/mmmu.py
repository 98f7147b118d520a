"""MMMU (Yue et al., 2024, arXiv:2311.16502): college questions with images, by subject. Apache-2.0.

Images come first, numbered; `<image 2>` in a question or an option becomes "image 2". So the images can be evicted
before the question is read, which in place they could not.
"""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Example, Segment, Turn
from retention.tasks.benchmarks.base import Row
from retention.tasks.benchmarks.sets import SetsTask
from retention.tasks.benchmarks.wording import SHORT, choice_turn
from retention.tasks.scorers.choice import LETTERS

MOST_IMAGES = 7
SUBJECTS = [
    "Accounting", "Agriculture", "Architecture_and_Engineering", "Art", "Art_Theory", "Basic_Medical_Science",
    "Biology", "Chemistry", "Clinical_Medicine", "Computer_Science", "Design",
    "Diagnostics_and_Laboratory_Medicine", "Economics", "Electronics", "Energy_and_Power", "Finance", "Geography",
    "History", "Literature", "Manage", "Marketing", "Materials", "Math", "Mechanical_Engineering", "Music",
    "Pharmacy", "Physics", "Psychology", "Public_Health", "Sociology",
]  # fmt: skip


def listed(value: str | list[str]) -> list[str]:
    """A list that may have been stored as the text of one, and a single text as a list."""
    if isinstance(value, str) and value.strip().startswith("["):
        value = ast.literal_eval(value)
    return [value] if isinstance(value, str) else [str(item) for item in value]


def named(text: str) -> str:
    """References to images as they are labelled in the context."""
    return re.sub(r"<image (\d+)>", r"image \1", text)


@dataclass
class MMMU(SetsTask):
    """A question of one subject with up to seven images, and options or a short answer."""

    name: ClassVar[str] = "mmmu"
    schema: ClassVar[dict[str, str]] = {
        "id": "text",
        "question": "text",
        "options": "answer",
        "answer": "text",
        "question_type": "text?",
        "topic_difficulty": "text?",
        "subfield": "text?",
        "subject": "text?",
        "image_1": "image",
    } | {f"image_{i}": "image?" for i in range(2, MOST_IMAGES + 1)}

    path: str = "MMMU/MMMU"
    subset: str | None = "Accounting"
    data_split: str = "validation"
    max_new_tokens: int = 16
    """Longest answer."""

    def known(self) -> Sequence[str]:
        """The 30 subjects."""
        return SUBJECTS

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """Numbered images, then the question with its options."""
        segments: list[Segment] = []
        for number in range(1, MOST_IMAGES + 1):
            if row.get(f"image_{number}") is not None:
                segments += [Segment("text", f"Image {number}: "), self.picture(row[f"image_{number}"])]
                segments.append(Segment("text", "\n"))
        choices = [named(option) for option in listed(row["options"])] if row["options"] else []
        if choices:
            turn = choice_turn(named(row["question"]), choices, LETTERS.index(row["answer"]), new=self.max_new_tokens)
        else:
            text, new = f"{named(row['question'])}\n{SHORT}", self.max_new_tokens
            turn = Turn(text, listed(row["answer"]), scorer="short_answer", max_new_tokens=new)
        groups = {"subject": row.get("subject") or self.subset, "difficulty": row.get("topic_difficulty")}
        return Example("", segments, [turn], "after", {"groups": groups})
