"""LongBench (Bai et al., 2024, arXiv:2308.14508): 21 sets in six kinds, English, Chinese and code.

Instruction, document, instruction again, question and cue, as the authors order them, in words of our own; few-shot and
code sets without the chat template; cut in the middle. Scorers as in the authors' evaluation, but for two: ROUGE-L is
that of the whole text as one sequence, and Chinese is compared by characters instead of jieba's words. The score of the
benchmark is the plain mean over its sets (`sets: [all]`, and the group `mean` of `set`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Example, Segment, Turn
from retention.tasks.benchmarks.base import Row
from retention.tasks.benchmarks.schema import column
from retention.tasks.benchmarks.sets import SetsTask
from retention.types import require


@dataclass(frozen=True)
class Set:
    """How one of the sets is asked: most new tokens, scorer, what stands before the document, and behind it."""

    new: int
    scorer: str
    before: str
    after: str
    plain: bool = False


_BRIEF = "Give the answer alone, as briefly as you can."
_STORY = "Below is a story, a novel or a film script. Answer a question about it in a phrase, without an explanation."
_PAPER = (
    'Below is a scientific article. Answer a question about it in a phrase or a sentence. Write "unanswerable" where the '
    'article does not tell, and "yes" or "no" where it is asked for.'
)
_PASSAGES = f"Answer the question from the passages. {_BRIEF}"
_ASKED = "\n\nQuestion: {input}\nAnswer:"


def _asked(new: int, what: str, told: str, scorer: str = "qa_f1") -> Set:
    return Set(new, scorer, f"{told}\n\n{what}:\n", f"\n\n{told}{_ASKED}")


def _summary(new: int, what: str, told: str, scorer: str = "rouge_l") -> Set:
    return Set(new, scorer, f"{told}\n\n{what}:\n", f"\n\n{told}\n\nSummary:")


SETS: dict[str, Set] = {
    "narrativeqa": _asked(128, "Story", _STORY),
    "qasper": _asked(128, "Article", _PAPER),
    "multifieldqa_en": _asked(64, "Text", f"Read the text and answer a question about it. {_BRIEF}"),
    "multifieldqa_zh": Set(
        64,
        "qa_f1_zh",
        "\u9605\u8bfb\u4e0b\u9762\u7684\u6587\u5b57\uff0c\u7528\u4e2d\u6587\u7b80\u77ed\u4f5c\u7b54\u3002\n\n",
        "\n\n\u6839\u636e\u4e0a\u6587\u56de\u7b54\u95ee\u9898\uff0c\u53ea\u5199\u7b54\u6848\u3002\n\n\u95ee\u9898\uff1a{input}\n\u56de\u7b54\uff1a",
    ),
    "hotpotqa": _asked(32, "Passages", _PASSAGES),
    "2wikimqa": _asked(32, "Passages", _PASSAGES),
    "musique": _asked(32, "Passages", _PASSAGES),
    "dureader": Set(
        128,
        "rouge_l_zh",
        "\u6839\u636e\u6587\u7ae0\u56de\u7b54\u95ee\u9898\u3002\n\n",
        "\n\n\u6839\u636e\u6587\u7ae0\u56de\u7b54\u95ee\u9898\u3002\n\n\u95ee\u9898\uff1a{input}\n\u56de\u7b54\uff1a",
    ),
    "gov_report": _summary(512, "Report", "Summarise this report of a government agency on one page."),
    "qmsum": _asked(
        512,
        "Transcript",
        "Below is the transcript of a meeting. Answer what is asked about it in a few sentences.",
        "rouge_l",
    ),
    "multi_news": _summary(512, "News", "Summarise these news passages together on one page."),
    "vcsum": Set(
        512,
        "rouge_l_zh",
        "\u4e0b\u9762\u662f\u4e00\u6b21\u4f1a\u8bae\u7684\u8bb0\u5f55\uff0c\u8bf7\u5199\u51fa\u603b\u7ed3\u3002\n\n",
        "\n\n\u8bf7\u603b\u7ed3\u8fd9\u6b21\u4f1a\u8bae\u3002\n\n\u603b\u7ed3\uff1a",
    ),
    "trec": Set(
        64,
        "classification_line",
        "Tell of what type the last question is. The others are examples.\n\n",
        "\n{input}",
        True,
    ),
    "triviaqa": Set(
        32,
        "qa_f1_line",
        f"Answer the question from its passage. {_BRIEF} Examples come first.\n\n",
        "\n\n{input}",
        True,
    ),
    "samsum": Set(
        128,
        "rouge_l_line",
        "Summarise the last dialogue in a few sentences. Examples come first.\n\n",
        "\n\n{input}",
        True,
    ),
    "lsht": Set(
        64,
        "classification_line",
        "\u8bf7\u5224\u65ad\u6700\u540e\u4e00\u6761\u65b0\u95fb\u7684\u7c7b\u522b\uff0c\u524d\u9762\u662f\u4f8b\u5b50\u3002\n\n",
        "\n{input}",
        True,
    ),
    "passage_count": Set(
        32,
        "numbers_share",
        "Below are paragraphs, some of them more than once. Count how many different ones there are.\n\n",
        "\n\nHow many different paragraphs are there? Give the number alone.\n\nThe number is: ",
    ),
    "passage_retrieval_en": Set(
        32,
        "numbers_share",
        "Below are 30 paragraphs and then an abstract. Find the paragraph that the abstract is of.\n\n",
        '\n\nThe abstract:\n\n{input}\n\nWhich paragraph is it of? Answer as in "Paragraph 1".\n\nThe answer is: ',
    ),
    "passage_retrieval_zh": Set(
        32,
        "numbers_share",
        "\u4e0b\u9762\u6709\u82e5\u5e72\u6bb5\u843d\u548c\u4e00\u4e2a\u6458\u8981\uff0c\u8bf7\u627e\u51fa\u6458\u8981\u5bf9\u5e94\u7684\u6bb5\u843d\u3002\n\n",
        "\n\n\u6458\u8981\uff1a\n\n{input}\n\n\u5b83\u51fa\u81ea\u54ea\u4e00\u6bb5\uff1f\u6309\u201c\u6bb5\u843d1\u201d\u7684\u683c\u5f0f\u4f5c\u7b54\u3002\n\n\u7b54\u6848\u662f\uff1a",
    ),
    "lcc": Set(64, "code_similarity", "Continue this code.\n", "Next line of code:\n", True),
    "repobench-p": Set(64, "code_similarity", "Continue this code.\n", "{input}Next line of code:\n", True),
}


@dataclass
class LongBench(SetsTask):
    """One set, named by `subset`; `<name>_e` is its part in LongBench-E."""

    name: ClassVar[str] = "longbench"
    schema: ClassVar[dict[str, str]] = {
        "input|question": "text",
        "context": "text",
        "answers": "texts",
        "length": "integer",
        "dataset": "text",
        "language": "text",
        "all_classes": "texts?",
        "_id": "text",
    }

    path: str = "Xnhyacinth/LongBench"
    subset: str | None = "narrativeqa"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (self.subset or "").removesuffix("_e") in SETS
        require([(known, f"task.longbench.subset among {', '.join(SETS)}, or with _e", self.subset)])

    def known(self) -> Sequence[str]:
        """The 21 sets."""
        return list(SETS)

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """Document between instructions, then the question."""
        rule = SETS[self.part.removesuffix("_e")]
        asked = rule.after.replace("{input}", column(row, "input|question"))
        turn = Turn(asked, list(row["answers"]), scorer=rule.scorer, max_new_tokens=rule.new)
        turn.choices = row.get("all_classes") or None
        length = row["length"]
        groups = {
            "set": self.part,
            "language": row["language"],
            "length": "0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+",
        }
        context = [Segment("text", rule.before + row["context"])]
        return Example("", context, [turn], "after", {"groups": groups}, plain=rule.plain)
