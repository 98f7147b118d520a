"""Short answers about pictures: against ten people's answers, and numbers within five per cent."""

import re
from collections.abc import Sequence

from retention.tasks.scorers.text import norm

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(i) for i, word in enumerate(_WORDS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = r";/\[\]\"{}()=+\\_\-><@`,?!"


def vqa_norm(text: str) -> str:
    """As the VQA evaluation does: no articles and punctuation, numerals for number words, contractions as one word."""
    text = text.replace("\n", " ").replace("\t", " ").strip().lower()
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(rf"(?<=\s)[{_PUNCTUATION}]|[{_PUNCTUATION}](?=\s|$)|^[{_PUNCTUATION}]", "", text)
    text = re.sub(rf"[{_PUNCTUATION}]", " ", text)
    text = re.sub(r"\.(?!\d)", "", text).replace("'", "")
    return " ".join(_NUMBERS.get(word, word) for word in text.split() if word not in _ARTICLES)


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
