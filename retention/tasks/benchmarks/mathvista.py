"""MathVista (Lu et al., 2024, arXiv:2310.02255): mathematics in pictures. CC BY-SA 4.0.

The authors let a language model extract the answer from what was said, bring it into the form of the reference, where an
option is the nearest by edit distance and a number has so many decimals, and compare the two. With `judge.model` one is
asked here, in words of our own; without, rules extract, scores are not comparable with theirs, and rows say so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Example, Turn
from retention.tasks.benchmarks.base import Row
from retention.tasks.benchmarks.judge import JudgedTask
from retention.tasks.benchmarks.wording import choice_turn, lettered
from retention.tasks.scorers.choice import LETTERS
from retention.tasks.scorers.text import edits

BOXED = "Reason step by step and put the final answer in \\boxed{}."
_TOLD = "Below are a question about a picture and what somebody answered to it. Do not solve it: write down the final answer"
_CASE = "\n\nQuestion: {question}\nAnswered: {reply}\n\nFinal answer:"
PROMPTS = {
    "multi_choice": f"{_TOLD} that was chosen, as the letter of its option alone.{_CASE}",
    "integer": f"{_TOLD} that was given, as a whole number alone.{_CASE}",
    "float": f"{_TOLD} that was given, as a number with decimals alone.{_CASE}",
    "list": f"{_TOLD} that was given, as a list in brackets alone.{_CASE}",
    "text": f"{_TOLD} that was given, in its own words alone.{_CASE}",
}
"""What a judge is asked, by type of question and answer."""


@dataclass
class MathVista(JudgedTask):
    """A picture and a question, with options or a number, text or list as answer."""

    name: ClassVar[str] = "mathvista"
    prompts: ClassVar[Mapping[str, str]] = PROMPTS
    reply_tokens: ClassVar[int] = 64
    schema: ClassVar[dict[str, str]] = {
        "pid": "text",
        "question": "text",
        "image": "text",
        "decoded_image": "image",
        "choices": "texts?",
        "unit": "text?",
        "precision": "number?",
        "answer": "text",
        "question_type": "text",
        "answer_type": "text",
        "metadata": "record",
        "query": "text",
    }

    path: str = "AI4Math/MathVista"
    data_split: str = "testmini"
    max_new_tokens: int = 512
    """Longest answer."""

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """The picture, then the question."""
        if row["choices"]:
            cue = "Reason step by step and end with the letter of the right option in brackets."
            turn = choice_turn(row["question"], row["choices"], row["answer"], new=self.max_new_tokens, cue=cue)
        else:
            unit = f" (in {row['unit']})" if row["unit"] else ""
            text, new = f"{row['question']}{unit}\n{BOXED}", self.max_new_tokens
            turn = Turn(text, row["answer"], scorer="math_equiv", max_new_tokens=new)
        groups = {"type": row["question_type"], "task": str(row["metadata"].get("task"))}
        return Example("", [self.picture(row["decoded_image"])], [turn], "after", {"groups": groups})

    def prompt(self, row: Row, prediction: str) -> str:
        """The question with its options, and the prediction."""
        kind = "multi_choice" if row["choices"] else row["answer_type"]
        question = "\n".join([row["question"], lettered(row["choices"] or [])]).strip()
        return PROMPTS.get(kind, PROMPTS["text"]).format(question=question, reply=prediction.strip())

    def verdict(self, row: Row, reply: str) -> float:
        """1 when the extracted answer, in the form of the reference, is the reference."""
        return float(formed(reply, row) == formed(row["answer"], row))


def formed(said: str, row: Row) -> str | float | None:
    """An answer as option, whole number, number of so many decimals or text; None where it is none."""
    said = said.strip()
    if row["choices"]:
        letter = said.strip("().: ").upper()
        if said not in row["choices"] and len(letter) == 1 and letter in LETTERS[: len(row["choices"])]:
            return str(row["choices"][LETTERS.index(letter)])
        return str(min(row["choices"], key=lambda choice: edits(said.lower(), choice.lower()))) if said else None
    if row["answer_type"] not in ("integer", "float"):
        return said
    try:
        value = float(said)
    except ValueError:
        return None
    return float(int(value)) if row["answer_type"] == "integer" else round(value, int(row["precision"] or 2))
