"""LongMemEval (Wu et al., 2025, arXiv:2410.10813): what a user once told, among many dated sessions. MIT.

The authors ask a language model whether an answer is right. Here an answer is right when it contains the reference, or
says that nothing is known where nothing is (`_abs`): not comparable with theirs, and the rows and ids say so.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from retention.data.example import EvidenceRef, Example, Segment, TextRef, Turn
from retention.data.hub import hub_file, open_source
from retention.data.source import Rows, SourceConfig
from retention.tasks.benchmarks.base import DatasetTask, Row
from retention.types import require

FILES = {
    "oracle": "longmemeval_oracle.json",
    "s": "longmemeval_s_cleaned.json",
    "m": "longmemeval_m_cleaned.json",
}
"""The sessions with evidence alone, about 115k tokens, and about 500 sessions."""


@dataclass
class LongMemEval(DatasetTask):
    """All sessions of a user, then a question with its date; sessions that answer it are marked as evidence."""

    name: ClassVar[str] = "longmemeval"
    comparable: ClassVar[bool] = False
    schema: ClassVar[dict[str, str]] = {
        "question_id": "text",
        "question_type": "text",
        "question": "text",
        "answer": "answer",
        "question_date": "text",
        "haystack_session_ids": "texts",
        "haystack_dates": "texts",
        "haystack_sessions": "list",
        "answer_session_ids": "texts",
    }

    path: str = "xiaowu0162/longmemeval-cleaned"
    history: str = "s"
    """oracle, s or m: how much stands around the evidence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require([(self.history in FILES, f"task.longmemeval.history among {', '.join(FILES)}", self.history)])

    @property
    def part(self) -> str:
        """How much history, and that no judge scored it."""
        return f"{self.history}-no-judge-not-comparable"

    def open(self) -> Rows:
        """The file as it lies on the hub: its answers are texts and numbers, which tables cannot hold."""
        file = Path(self.path) if Path(self.path).is_file() else hub_file(self.source, FILES[self.history])
        found = open_source(SourceConfig(str(file)))
        assert isinstance(found, Rows)
        return found

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """Dated sessions, then the question with its date."""
        segments = [Segment("text", "Below are your conversations with one user, by date.\n")]
        evidence: list[EvidenceRef | TextRef] = []
        for date, session in zip(row["haystack_dates"], row["haystack_sessions"], strict=True):
            text = f"\nConversation of {date}:\n"
            for message in session:
                start = len(text)
                text += f"{message['role']}: {message['content'].strip()}\n"
                if message.get("has_answer"):
                    evidence.append(TextRef(len(segments), start, len(text) - 1))
            segments.append(Segment("text", text))
        asked = f"\nIt is {row['question_date']}. Answer the user's question from these conversations.\n"
        abstains = row["question_id"].endswith("_abs")
        text, scorer = f"{asked}Question: {row['question']}\nAnswer:", "abstention" if abstains else "contains_any"
        turn = Turn(text, str(row["answer"]), evidence, scorer=scorer, max_new_tokens=256)
        groups: dict[str, Any] = {"type": row["question_type"], "abstention": abstains}
        return Example("", segments, [turn], "after", {"groups": groups})
