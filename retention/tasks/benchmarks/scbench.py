"""SCBench (Li et al., 2025, arXiv:2412.10319): several questions on one long context, in two modes. MIT.

`multi_turn`: one dialogue in which the answers stay; the model's own ones here, the reference ones at the authors.
`same_context`: every question is asked of the cache as the context left it. Scorers as in the authors' evaluation,
which takes English questions on books for right where the answer is contained; the function that is repeated is compared
with the others of the same context.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from retention.data.example import Example, Segment, Turn
from retention.tasks.benchmarks.base import Row
from retention.tasks.benchmarks.schema import check_row
from retention.tasks.benchmarks.sets import SetsTask
from retention.tasks.benchmarks.wording import choice_turn
from retention.tasks.further import Row as Answer
from retention.tasks.further import counted, mean_score
from retention.types import require

MODES = ("multi_turn", "same_context")
_BOOK = "Read this book, then answer questions about it."
_KEYS = "You will be asked for the values of keys in this JSON object."
_CODE = (
    "You will be given descriptions of functions in this code. Repeat each function exactly, in a block of code in ```."
)
SETS: dict[str, tuple[int, str, str, str]] = {
    "scbench_kv": (150, "contains_any", _KEYS, "{input}"),
    "scbench_prefix_suffix": (150, "contains_any", "", "{input}"),
    "scbench_vt": (30, "contains_all", "", "{input}"),
    "scbench_repoqa": (1024, "function_match", _CODE, "{input}"),
    "scbench_qa_eng": (40, "contains_any", f"{_BOOK} Be very brief.", "Question: {input}\nAnswer:"),
    "scbench_qa_chn": (
        40,
        "qa_f1_zh",
        "\u9605\u8bfb\u8fd9\u672c\u4e66\uff0c\u7136\u540e\u56de\u7b54\u95ee\u9898\u3002",
        "\u95ee\u9898\uff1a{input}\n\u7b54\u6848\uff1a",
    ),
    "scbench_choice_eng": (40, "choice_letter", _BOOK, "Question: {input}"),
    "scbench_many_shot": (10, "contains_any", "", "{input}"),
    "scbench_summary": (200, "rouge_lsum", "", "{input}"),
    "scbench_mf": (5, "first_number", "You will be asked about the numbers of this list.", "{input}"),
    "scbench_summary_with_needles": (800, "rouge_lsum", "", "{input}"),
    "scbench_repoqa_and_kv": (1024, "function_match", _CODE, "{input}"),
    "scbench_passkey": (15, "first_number", "", "{input}"),
}
"""Most new tokens, scorer, what stands before the context, and a question; sets of two tasks name each turn's."""
PART = "scbench_passkey"
"""Comes within summary_with_needles alone."""
MIXED = {
    "scbench_repoqa_and_kv": {"scbench_repoqa": 1024, "scbench_kv": 80},
    "scbench_summary_with_needles": {"scbench_summary": 800, PART: 15},
}
"""Sets of two tasks, with the most new tokens of each there."""


@dataclass
class SCBench(SetsTask):
    """One set, named by `subset`: its context and all questions of a row."""

    name: ClassVar[str] = "scbench"
    schema: ClassVar[dict[str, str]] = {"id": "answer", "context": "any", "multi_turns": "list"}

    path: str = "microsoft/SCBench"
    subset: str | None = "scbench_kv"
    mode: str = "multi_turn"
    """multi_turn or same_context."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            [
                (self.subset in SETS, f"task.scbench.subset among {', '.join(SETS)}", self.subset),
                (self.mode in MODES, f"task.scbench.mode among {', '.join(MODES)}", self.mode),
            ]
        )

    @property
    def part(self) -> str:
        """Set and mode."""
        return f"{self.subset}-{self.mode}"

    def known(self) -> Sequence[str]:
        """The twelve sets."""
        return [name for name in SETS if name != PART]

    @classmethod
    def further(cls, rows: Sequence[Answer]) -> dict[str, float]:
        """The score of each of the two tasks of a mixed set, told apart by their scorers."""
        told: dict[str, float] = {}
        for mixed, parts in MIXED.items():
            for part in parts:
                own = [x for x in counted(rows) if (x["groups"].get("set"), x["scorer"]) == (mixed, SETS[part][1])]
                told |= {f"{part} in {mixed}".replace("scbench_", ""): mean_score(own)} if own else {}
        return super().further(rows) | told

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """Instruction and context, then the questions."""
        turns = [self._turn(asked, row["multi_turns"]) for asked in row["multi_turns"]]
        alone = self.mode == "same_context"
        context = row["context"] if isinstance(row["context"], str) else str(row["context"])
        before = SETS[str(self.subset)][2]
        return Example(
            "",
            [Segment("text", f"{before}\n\n{context}\n\n" if before else f"{context}\n\n")],
            turns,
            "deferred_turn" if len(turns) > 1 and not alone else "after",
            {"groups": {"set": self.subset, "mode": self.mode}},
            independent=alone,
        )

    def _turn(self, asked: Mapping[str, Any], every: list[Mapping[str, Any]]) -> Turn:
        check_row(f"{self.name}.multi_turns", asked, {"input": "text", "answer": "answer", "options": "texts?"})
        subset = str(self.subset)
        own = str(asked.get("task") or subset)
        own = own if own in SETS else subset
        new, scorer, _, question = SETS[own]
        new = MIXED.get(subset, {}).get(own, new)
        text, told = question.replace("{input}", asked["input"]), asked["answer"]
        if scorer == "choice_letter":
            return choice_turn(text, asked["options"], told, new=new)
        answer = [str(item) for item in told] if isinstance(told, list) else str(told)
        turn = Turn(text, answer, scorer=scorer, max_new_tokens=new)
        if scorer == "function_match":
            turn.choices = [str(other["answer"]) for other in every if other.get("task", own) == own]
        if scorer == "contains_all":
            turn.told = ", ".join(answer)
        return turn
