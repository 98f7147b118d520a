"""Short answers about pictures: against ten people's answers, and numbers within five per cent."""

import re
from collections.abc import Sequence

from retention.tasks.scorers.text import norm

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(i) for i, word in enumerate(_WORDS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTION = re.compile(
    r"\w+n't|\w+'(?:ve|ll|re|d)|(?:he|she|that|there|what|when|where|who|why|how|let|(?:some|every|no)(?:body|one|thing))'s"
)
_OTHER_WORDS = ("hell", "id", "ill", "shed", "shell", "wed", "well", "were")
"""What contractions become without their apostrophe and mean something else."""


def vqa_norm(text: str) -> str:
    """As the VQA evaluation does: no articles and punctuation, numerals for number words, contractions as one word.

    A punctuation mark goes wherever it stands if it stands beside a space anywhere, or if the text has a comma between
    digits; else it becomes a space. Full stops go unless a digit follows.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip().lower()
    told, joined = text, re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        text = text.replace(mark, "" if joined or f"{mark} " in told or f" {mark}" in told else " ")
    words = re.sub(r"\.(?!\d)", "", text).split()
    return " ".join(_NUMBERS.get(word, _bare(word)) for word in words if word not in _ARTICLES)


def _bare(word: str) -> str:
    """A contraction without its apostrophe; other words as they are."""
    bare = word.replace("'", "")
    return bare if _CONTRACTION.fullmatch(word) and bare not in _OTHER_WORDS else word


def vqa_soft(prediction: str, answers: Sequence[str]) -> float:
    """Mean over answers left out of min(1, equal answers among the others / 3) (VQA v2, TextVQA, VizWiz).

    With one answer alone, 1 when it is given.
    """
    said, told = vqa_norm(prediction), [vqa_norm(answer) for answer in answers]
    if len(told) == 1:
        return float(said == told[0])
    equal = told.count(said)
    return sum(min(1.0, (equal - (answer == said)) / 3) for answer in told) / len(told)


def as_number(text: str) -> float | None:
    """A text that is nothing but a number, a share where it ends in a per cent sign; else None."""
    text = text.strip().replace(",", "").removesuffix(".").removeprefix("$")
    share = text.endswith("%")
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text.removesuffix("%").strip(), re.IGNORECASE):
        return None
    value = float(text.removesuffix("%"))
    return value / 100 if share else value


def relaxed(prediction: str, answer: str) -> float:
    """1 when a number is within 5 % of the answer's, or a text equals it (ChartQA); a zero has to be met."""
    said, wanted = as_number(prediction), as_number(answer)
    if said is None or wanted is None:
        return float(norm(prediction) == norm(answer))
    return float(said == wanted if wanted == 0 else abs(said - wanted) / abs(wanted) <= 0.05 + 1e-12)
