"""InfiniteBench (Zhang et al., 2024, arXiv:2402.13718): twelve parts of 100k tokens and more. Apache-2.0.

Instruction, context, question; cut in the middle; scorers as in the authors' evaluation, except that a letter is read by
our own rules and a masked name may have several words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Example, Segment, Turn
from retention.tasks.benchmarks.base import Row
from retention.tasks.benchmarks.sets import SetsTask
from retention.tasks.benchmarks.wording import choice_turn
from retention.types import require

_HIDDEN = (
    "Somewhere in much text that does not matter something important is said. Find and remember it: you will be asked."
)
_BOOK = "Read this book, then answer a question about it."
PARTS: dict[str, tuple[int, str, str, str]] = {
    "passkey": (6, "first_number", _HIDDEN, "{input} The pass key is"),
    "number_string": (12, "first_number", _HIDDEN, "{input} The sequence of digits is"),
    "kv_retrieval": (50, "word_in", "Find the value of a key in this JSON object.", "{input}"),
    "longbook_sum_eng": (1200, "rouge_lsum", "Summarise this book.", "{input}\n\nSummary:"),
    "longbook_choice_eng": (40, "choice_letter", _BOOK, "Question: {input}"),
    "longbook_qa_eng": (40, "qa_f1", _BOOK, "Question: {input}\nBe very brief.\nAnswer:"),
    "longbook_qa_chn": (
        40,
        "qa_f1_zh",
        "\u9605\u8bfb\u8fd9\u672c\u4e66\uff0c\u7136\u540e\u56de\u7b54\u95ee\u9898\u3002",
        "\u95ee\u9898\uff1a{input}\n\u8bf7\u5c3d\u91cf\u7b80\u77ed\u5730\u56de\u7b54\u3002\n\u7b54\u6848\uff1a",
    ),
    "longdialogue_qa_eng": (
        40,
        "word_in",
        'In this script one name of a character is replaced with "$$MASK$$". Find out which.',
        "{input}\nThe name that $$MASK$$ stands for is",
    ),
    "math_find": (3, "first_number", "Find a number in this list.", "{input}"),
    "math_calc": (
        30_000,
        "list_start",
        "Give all values in between of this sum, from left to right: of 1 + 3 + 4 they are [1, 4, 8].",
        "{input}\nValues:",
    ),
    "code_run": (5, "last_integer", "These are functions in Python.", "{input}\nThe value is"),
    "code_debug": (5, "choice_letter", "One function of this code has a deliberate error. Find it.", "{input}"),
}
"""Most new tokens, scorer, what stands before the context, and behind it."""


@dataclass
class InfiniteBench(SetsTask):
    """One part, named by `data_split`."""

    name: ClassVar[str] = "infinitebench"
    names_set: ClassVar[str] = "data_split"
    schema: ClassVar[dict[str, str]] = {
        "id": "integer",
        "context": "text",
        "input": "text",
        "answer": "answer",
        "options": "texts?",
    }

    path: str = "xinrongzhang2022/InfiniteBench"
    data_split: str = "passkey"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.data_split in PARTS
        require([(known, f"task.infinitebench.data_split among {', '.join(PARTS)}", self.data_split)])

    def known(self) -> Sequence[str]:
        """The twelve parts."""
        return list(PARTS)

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """Instruction and context, then the question."""
        new, scorer, before, after = PARTS[self.data_split]
        asked, told = after.replace("{input}", row["input"]), row["answer"]
        answers = [str(item) for item in told] if isinstance(told, list) else [str(told)]
        if scorer == "choice_letter":
            turn = choice_turn(asked, row["options"], _option(answers, row["options"]), new=new)
        else:
            turn = Turn(asked, answers, scorer=scorer, max_new_tokens=new)
            if scorer == "list_start":
                turn.told = f"[{', '.join(answers)}]"
        text = f"{before}\n\n{row['context']}\n\n"
        return Example("", [Segment("text", text)], [turn], "after", {"groups": {"part": self.data_split}})


def _option(answers: Sequence[str], options: Sequence[str]) -> str:
    """The right option, given by its text, its letter, or both."""
    return next((answer for answer in answers if answer in options), answers[-1])
