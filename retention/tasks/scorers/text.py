"""Words and strings: equal, contained, in common, or nearly so."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence


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


def token_in_split(prediction: str, answer: str) -> float:
    """1 when the answer is a word of the prediction (the rule of MileBench's needles)."""
    return float(norm(answer) in norm(prediction).split())


def contained(prediction: str, answer: str) -> float:
    """1 when the answer stands in the prediction, letter case aside."""
    return float(bool(answer) and answer.lower() in prediction.lower())


def contains_all(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand in the prediction (RULER's `all`)."""
    return sum(contained(prediction, answer) for answer in answers) / len(answers)


def word_in(prediction: str, answer: str) -> float:
    """1 when the answer is a word of the prediction once punctuation is blank (keys and values of SCBench, InfiniteBench)."""
    return float(answer.strip().lower() in re.sub(r"[\n:\"'.,?!{}]", " ", prediction).lower().split())


def lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for item in a:
        before = row
        row = [0]
        for place, other in enumerate(b):
            row.append(before[place] + 1 if item == other else max(before[place + 1], row[place]))
    return row[-1]


def edits(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions of one character."""
    row = list(range(len(b) + 1))
    for i, item in enumerate(a, 1):
        before, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (item != other)))
    return row[-1]


def anls(prediction: str, answer: str) -> float:
    """1 - distance / longer length, 0 below one half (ANLS of Biten et al., 2019), letter case and spaces aside."""
    said, wanted = (" ".join(text.lower().split()) for text in (prediction, answer))
    if not said or not wanted:
        return 0.0
    near = 1 - edits(said, wanted) / max(len(said), len(wanted))
    return near if near >= 0.5 else 0.0
