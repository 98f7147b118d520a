"""Multiple choice, yes or no, and classes: what was chosen, or that it cannot be read."""

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_COMMON = 10
"""Letters that count as options where the number of options is not told."""


def chosen_letter(prediction: str, choices: Sequence[str] | None = None) -> str | None:
    """The letter a prediction chooses, None where there is none: nothing is guessed.

    In this order: a letter alone; one followed by a full stop, colon or bracket; one in brackets; one after "answer
    is" or "option"; the text of exactly one option.
    """
    letters = LETTERS[: len(choices) if choices else _COMMON]
    alone = re.sub(r"[\W_]+", "", prediction).upper()
    if len(alone) == 1 and alone in letters:
        return alone
    said = prediction.replace("*", "")
    patterns = (
        rf"(?<!\w)([{letters}])[.:)](?!\w)",
        rf"[(\[]\s*([{letters}{letters.lower()}])\s*[)\]]",
        rf"(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?:\s+is)?\s*:?\s*([{letters}])(?!\w)",
    )
    for pattern in patterns:
        if found := re.search(pattern, said):
            return found[1].upper()
    return _by_text(said, choices or [], letters)


def _by_text(prediction: str, choices: Sequence[str], letters: str) -> str | None:
    """The letter of the one option whose text stands in the prediction; an option inside another one found is not meant."""
    said = " ".join(prediction.lower().split())
    texts = [" ".join(choice.lower().split()) for choice in choices]
    found = [text for text in texts if text and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", said)]
    meant = [text for text in set(found) if not any(text != other and text in other for other in found)]
    if len(meant) != 1 or texts.count(meant[0]) != 1:
        return None
    return letters[texts.index(meant[0])]


def choice_letter(prediction: str, answer: str, choices: Sequence[str] | None = None) -> float:
    """1 when the letter of the answer was chosen; what cannot be read is wrong."""
    return float(chosen_letter(prediction, choices) == answer.strip().upper())


def said_yes_no(prediction: str) -> str | None:
    """The first of yes and no as a word."""
    found = re.search(r"\b(yes|no)\b", prediction.lower())
    return found[1] if found else None


def yes_no(prediction: str, answer: str) -> float:
    """1 when the first of yes and no is the answer."""
    return float(said_yes_no(prediction) == answer.strip().lower().rstrip("."))


def classification(prediction: str, answer: str, choices: Sequence[str] | None = None) -> float:
    """1 / number of classes that the prediction names, if the right one is among them (LongBench).

    Classes whose name is part of the right one's do not count.
    """
    named = [name for name in choices or [answer] if name and name in prediction]
    meant = [name for name in named if name == answer or name not in answer]
    return 1 / len(meant) if answer in meant else 0.0


_UNKNOWN = re.compile(
    r"\b(don't|do not|doesn't|does not|didn't|did not|never|no|not|cannot|can't|unable|insufficient|incomplete)\b[^.!?]*"
    r"\b(know|mention\w*|information|enough|provided?|discuss\w*|shared?|specif\w+|record\w*|found|say|said|tell|told|determine)\b"
    r"|\bunanswerable\b|\bunknown\b",
    re.IGNORECASE,
)


def abstention(prediction: str, answer: str) -> float:
    """1 when the prediction says that it is not known: by its words, where the authors ask a judge (LongMemEval)."""
    return float(bool(_UNKNOWN.search(prediction.replace("\u2019", "'"))))
