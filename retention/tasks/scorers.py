"""How an answer is scored: functions from prediction and reference to [0, 1]."""

import re
import unicodedata
from collections import Counter
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


def overlap(prediction: str, answer: str) -> float:
    """Words in common, as F1 of the prediction and as much of the answer as it is long."""
    said = norm(prediction).split()
    wanted = norm(answer).split()[: max(1, len(said))]
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


SCORERS: dict[str, Callable[[str, str], float]] = {"exact": exact, "overlap": overlap, "symbol": symbol}
