"""LongBench v2 (Bai et al., 2024, arXiv:2412.15204): multiple choice on long documents, by difficulty and length.

Document, question, four options; cut in the middle; accuracy of the letter. With `chain_of_thought` a first pass thinks in
free text and a second one asks for the letter, which alone is scored. The authors start the second pass anew, without the
document; here it goes on behind the first, over the cache as it is. Apache-2.0.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from retention.data.example import Example, Segment
from retention.tasks.benchmarks.base import DatasetTask, Row
from retention.tasks.benchmarks.wording import choice_turn
from retention.tasks.scorers.choice import LETTERS
from retention.types import require

LETTER = 'Choose one option and end with "The correct answer is (letter)".'
THINK = "Think about it step by step; do not choose yet."
DECIDE = f"\nWhich option is the likeliest after these thoughts? {LETTER}"


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
    chain_of_thought: bool = False
    """Think in free text first."""
    most_thought: int = 1024
    """Most tokens of the thoughts; rows tell which were cut off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require([(self.most_thought >= 1, "task.longbench_v2.most_thought of at least 1", self.most_thought)])

    @property
    def part(self) -> str:
        """The split, and whether it is thought about first."""
        return f"{super().part}-cot" if self.chain_of_thought else super().part

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """The document in tags, then the question with its options, in one pass or in two."""
        choices, right = [row[f"choice_{letter}"] for letter in "ABCD"], LETTERS.index(row["answer"])
        asked, new = f"Question: {row['question']}", self.max_new_tokens
        turns = [choice_turn(asked, choices, right, new=new, cue=LETTER)]
        if self.chain_of_thought:
            thought = choice_turn(asked, choices, right, new=self.most_thought, cue=THINK)
            turns = [replace(thought, scored=False), replace(turns[0], question=DECIDE)]
        text = f"Read this text, then answer a question about it.\n<text>\n{row['context'].strip()}\n</text>\n\n"
        groups = {name: row[name] for name in ("difficulty", "length", "domain")}
        groups["difficulty x length"] = f"{row['difficulty']} x {row['length']}"
        return Example("", [Segment("text", text)], turns, "after", {"groups": groups})
