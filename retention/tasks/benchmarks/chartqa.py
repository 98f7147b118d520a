"""ChartQA (Masry et al., 2022, arXiv:2203.10244): questions on charts, within five per cent, by kind of question."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Example, Turn
from retention.tasks.benchmarks.base import DatasetTask, Row
from retention.tasks.benchmarks.schema import column
from retention.tasks.benchmarks.wording import SHORT


@dataclass
class ChartQA(DatasetTask):
    """A chart and a question; the copies of the data set name their columns differently."""

    name: ClassVar[str] = "chartqa"
    schema: ClassVar[dict[str, str]] = {
        "image": "image",
        "question|query": "text",
        "answer|label": "answer",
        "type|human_or_machine": "answer",
    }

    path: str = "lmms-lab/ChartQA"

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """The chart, then the question."""
        told = column(row, "answer|label")
        answers = [told] if isinstance(told, str) else list(told)
        turn = Turn(f"{column(row, 'question|query')}\n{SHORT}", answers, scorer="relaxed", max_new_tokens=16)
        kind = str(column(row, "type|human_or_machine"))
        return Example("", [self.picture(row["image"])], [turn], "after", {"groups": {"type": kind}})
