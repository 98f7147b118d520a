"""MMMU-Pro (Yue et al., 2025, arXiv:2409.02813): MMMU with ten options, or with the question inside the image. Apache-2.0."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Example
from retention.tasks.benchmarks.base import Row
from retention.tasks.benchmarks.mmmu import MMMU, listed
from retention.tasks.benchmarks.schema import check_row
from retention.tasks.benchmarks.wording import choice_turn
from retention.tasks.scorers.choice import LETTERS

TEN, VISION = "standard (10 options)", "vision"


@dataclass
class MMMUPro(MMMU):
    """As MMMU; with subset `vision`, one image that shows the question and its options."""

    name: ClassVar[str] = "mmmu_pro"
    schema: ClassVar[dict[str, str]] = {"id": "text", "options": "answer", "answer": "text", "subject": "text"}

    path: str = "MMMU/MMMU_Pro"
    subset: str | None = TEN
    data_split: str = "test"

    def known(self) -> Sequence[str]:
        """The two whose mean is the authors' score."""
        return [TEN, VISION]

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """Images and question, or the image that shows both."""
        if self.subset != VISION:
            check_row(self.name, row, MMMU.schema)
            found = super().build(row, rng)
            found.meta["groups"]["set"] = self.subset
            return found
        check_row(self.name, row, {"image": "image"})
        choices = listed(row["options"])
        turn = choice_turn(
            "Answer the question in the image.", choices, LETTERS.index(row["answer"]), new=self.max_new_tokens
        )
        turn.question = "Answer the question in the image with the letter of the right option alone."
        groups = {"subject": row["subject"], "set": self.subset}
        return Example("", [self.picture(row["image"])], [turn], "after", {"groups": groups})
