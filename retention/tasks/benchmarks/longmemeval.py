"""LongMemEval (Wu et al., 2025, arXiv:2410.10813): what a user once told, among many dated sessions. MIT.

The authors ask a language model whether an answer is right, in one way for each type of question and for what cannot be
answered (`_abs`); theirs is gpt-4o-2024-08-06, and a reply with "yes" in it is a yes. With `judge.model` one is asked here,
in words of our own. Without, an answer is right when it contains the reference, or says that nothing is known where
nothing is: not comparable with theirs, and the rows and ids say so. Besides the mean over questions they report the plain
mean over types and the score of what cannot be answered: see the groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from retention.data.example import EvidenceRef, Example, Segment, TextRef, Turn
from retention.data.hub import hub_file, open_source
from retention.data.source import Rows, SourceConfig
from retention.tasks.benchmarks.base import Row
from retention.tasks.benchmarks.judge import JudgedTask
from retention.types import require

FILES = {
    "oracle": "longmemeval_oracle.json",
    "s": "longmemeval_s_cleaned.json",
    "m": "longmemeval_m_cleaned.json",
}
"""The sessions with evidence alone, about 115k tokens, and about 500 sessions."""
_CASE = "Question: {question}\nReference: {answer}\nReply: {reply}\n\n"
_RIGHT = (
    "An assistant was asked a question about earlier conversations. Compare its reply with the reference answer. The reply "
    "is right if it says the same as the reference, in whatever words, or goes through all steps that lead to it. It is wrong "
    "if it holds a part alone of what the reference asks for."
)
_VERDICT = "Is the reply right? Say yes or no, nothing else."
PROMPTS = {
    "usual": f"{_RIGHT}\n\n{_CASE}{_VERDICT}",
    "temporal-reasoning": f"{_RIGHT} A number of days, weeks or months may be off by one.\n\n{_CASE}{_VERDICT}",
    "knowledge-update": f"{_RIGHT} It may tell what was true before as well, as long as it gives what the reference says as "
    f"the present state.\n\n{_CASE}{_VERDICT}",
    "single-session-preference": "An assistant was asked for advice by a user whose wishes it knows from earlier conversations. "
    "The reference describes what the user would like. The reply is right if it remembers what it knows of the user and uses it "
    f"well; it need not have every point.\n\n{_CASE}{_VERDICT}",
    "abstention": "An assistant was asked something that earlier conversations do not tell; the reference explains why. The "
    "reply is right if it recognises that, for instance by saying that it lacks the information or knows of something else "
    f"alone.\n\n{_CASE}{_VERDICT}",
}
"""What a judge is asked, by type of question; the rules of each are those of the authors' evaluation."""
USUAL = ("single-session-user", "single-session-assistant", "multi-session")


@dataclass
class LongMemEval(JudgedTask):
    """All sessions of a user, then a question with its date; sessions that answer it are marked as evidence."""

    name: ClassVar[str] = "longmemeval"
    prompts: ClassVar[Mapping[str, str]] = PROMPTS
    reply_tokens: ClassVar[int] = 10
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
        """How much history, and whether a judge scores it."""
        return f"{self.history}-judged" if self.comparable else f"{self.history}-no-judge-not-comparable"

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
        abstains = _abstains(row)
        text, scorer = f"{asked}Question: {row['question']}\nAnswer:", "abstention" if abstains else "contains_any"
        turn = Turn(text, str(row["answer"]), evidence, scorer=scorer, max_new_tokens=256)
        groups: dict[str, Any] = {"type": row["question_type"], "abstention": abstains}
        return Example("", segments, [turn], "after", {"groups": groups})

    def prompt(self, row: Row, prediction: str) -> str:
        """The question without the conversations, the reference, and the prediction.

        Raises:
            ValueError: for a type of question that the authors do not have.
        """
        kind = "usual" if row["question_type"] in USUAL else row["question_type"]
        kind = "abstention" if _abstains(row) else kind
        if kind not in PROMPTS:
            known = ", ".join((*USUAL, *PROMPTS))
            raise ValueError(
                f"longmemeval: expected a question_type among {known}, got {kind!r}; score it without a judge"
            )
        return PROMPTS[kind].format(question=row["question"], answer=row["answer"], reply=prediction.strip())

    def verdict(self, row: Row, reply: str) -> float:
        """1 for a reply with yes in it."""
        return float("yes" in reply.lower())


def _abstains(row: Row) -> bool:
    return bool(row["question_id"].endswith("_abs"))
