"""TextVQA (Singh et al., 2019, arXiv:1904.08920): what is written in a photograph, against ten people's answers.

No words of an OCR engine are shown. CC BY 4.0.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Example
from retention.tasks.benchmarks.base import DatasetTask, Row
from retention.tasks.benchmarks.wording import photograph_turn


@dataclass
class TextVQA(DatasetTask):
    """A photograph and a question; questions on one photograph are one cluster."""

    name: ClassVar[str] = "textvqa"
    schema: ClassVar[dict[str, str]] = {
        "image_id": "text",
        "question_id": "integer",
        "question": "text",
        "image": "image",
        "answers": "texts",
        "ocr_tokens": "texts?",
    }

    path: str = "lmms-lab/textvqa"
    data_split: str = "validation"

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """The photograph, then the question with a capital."""
        asked = row["question"].strip()
        turn = photograph_turn(f"{asked[:1].upper()}{asked[1:]}", row["answers"])
        return Example("", [self.picture(row["image"])], [turn], "after", {"cluster": row["image_id"]})
