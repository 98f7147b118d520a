"""How an answer is scored: functions from prediction and reference to [0, 1]."""

import re
import unicodedata
from collections.abc import Callable


def norm(text: str) -> str:
    """NFKC, lower case, white space collapsed, one trailing full stop removed."""
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip().lower()
    return text.removesuffix(".").strip()


def exact(prediction: str, answer: str) -> float:
    """1 when both are equal after normalisation."""
    return float(norm(prediction) == norm(answer))


def symbol(prediction: str, answer: str) -> float:
    """1 when the first word of the prediction is the answer."""
    words = norm(prediction).split()
    return float(bool(words) and words[0].strip(".,:;!") == norm(answer))


SCORERS: dict[str, Callable[[str, str], float]] = {"exact": exact, "symbol": symbol}
