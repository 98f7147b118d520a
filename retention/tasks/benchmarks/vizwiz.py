"""VizWiz-VQA (Gurari et al., 2018, arXiv:1802.08218): photographs by blind people, some questions without an answer.

CC BY 4.0.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Example
from retention.tasks.benchmarks.base import DatasetTask, Row
from retention.tasks.benchmarks.wording import photograph_turn

UNANSWERABLE = 'Where the picture does not tell, answer "unanswerable".'


@dataclass
class VizWiz(DatasetTask):
    """A photograph and a question."""

    name: ClassVar[str] = "vizwiz"
    schema: ClassVar[dict[str, str]] = {
        "question_id": "text",
        "image": "image",
        "question": "text",
        "answers": "texts",
        "category": "text",
    }

    path: str = "lmms-lab/VizWiz-VQA"
    data_split: str = "val"

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """The photograph, then the question and what to say where there is no answer."""
        turn = photograph_turn(row["question"], row["answers"], UNANSWERABLE)
        return Example("", [self.picture(row["image"])], [turn], "after", {"groups": {"category": row["category"]}})
