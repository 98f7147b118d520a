"""LongBench v2 (Bai et al., 2024, arXiv:2412.15204): multiple choice on long documents, by difficulty and length.

Document, question, four options; cut in the middle; accuracy of the letter. Apache-2.0.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Example, Segment
from retention.tasks.benchmarks.base import DatasetTask, Row
from retention.tasks.benchmarks.wording import choice_turn
from retention.tasks.scorers.choice import LETTERS


@dataclass
class LongBenchV2(DatasetTask):
    """One document and one question with four options."""

    name: ClassVar[str] = "longbench_v2"
    schema: ClassVar[dict[str, str]] = {
        "_id": "text",
        "domain": "text",
        "sub_domain": "text",
        "difficulty": "text",
        "length": "text",
        "question": "text",
        "choice_A": "text",
        "choice_B": "text",
        "choice_C": "text",
        "choice_D": "text",
        "answer": "text",
        "context": "text",
    }

    path: str = "THUDM/LongBench-v2"
    data_split: str = "train"
    max_new_tokens: int = 128
    """Longest answer."""

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """The document in tags, then the question with its options."""
        choices = [row[f"choice_{letter}"] for letter in "ABCD"]
        cue = 'Choose one option and end with "The correct answer is (letter)".'
        turn = choice_turn(
            f"Question: {row['question']}", choices, LETTERS.index(row["answer"]), new=self.max_new_tokens, cue=cue
        )
        text = f"Read this text, then answer a question about it.\n<text>\n{row['context'].strip()}\n</text>\n\n"
        groups = {name: row[name] for name in ("difficulty", "length", "domain")}
        return Example("", [Segment("text", text)], [turn], "after", {"groups": groups})
