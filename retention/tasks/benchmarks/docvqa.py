"""DocVQA (Mathew et al., 2021, arXiv:2007.00398): questions on one page, scored by ANLS."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Example, Turn
from retention.tasks.benchmarks.base import DatasetTask, Row
from retention.tasks.benchmarks.wording import SHORT


@dataclass
class DocVQA(DatasetTask):
    """A page and a question; pages of one document are one cluster."""

    name: ClassVar[str] = "docvqa"
    schema: ClassVar[dict[str, str]] = {
        "questionId": "text",
        "question": "text",
        "question_types": "texts?",
        "image": "image",
        "docId": "integer",
        "ucsf_document_id": "text",
        "ucsf_document_page_no": "text",
        "answers": "texts",
        "data_split": "text",
    }

    path: str = "lmms-lab/DocVQA"
    subset: str | None = "DocVQA"
    data_split: str = "validation"

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """The page, then the question."""
        turn = Turn(f"{row['question']}\n{SHORT}", list(row["answers"]), scorer="anls", max_new_tokens=32)
        return Example("", [self.picture(row["image"])], [turn], "after", {"cluster": row["ucsf_document_id"]})
