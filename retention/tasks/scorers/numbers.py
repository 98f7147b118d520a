"""Answers that are one number: the first or the last that is said."""

import re

from retention.tasks.scorers.text import norm

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def _values(text: str) -> list[float]:
    return [float(found.replace(",", "").replace("$", "")) for found in _NUMBER.findall(text)]


def numeric(prediction: str, answer: str) -> float:
    """1 when the last number, or the first behind `####`, equals the answer's (GSM8K)."""
    said, wanted = _values(prediction), _values(answer)
    if "####" in prediction:
        said = _values(prediction.rpartition("####")[2])[:1]
    return float(bool(said) and bool(wanted) and abs(said[-1] - wanted[-1]) < 1e-6)


def first_number(prediction: str, answer: str) -> float:
    """1 when the first number, signs aside, equals the answer (InfiniteBench's retrieval and Math.Find)."""
    found = re.search(r"\d+\.\d+|\d+", prediction)
    if found is None:
        return 0.0
    if re.fullmatch(r"\d+", answer):  # a pass key's zeros in front count, and decimals of a whole number do not
        return float(found[0].partition(".")[0] == answer)
    return float(float(found[0]) == float(answer))


def last_integer(prediction: str, answer: str) -> float:
    """1 when the last word is a whole number and the answer's (InfiniteBench's Code.Run)."""
    words = re.sub(r"[\n.`'\":]", " ", prediction).split()
    whole = bool(words) and re.fullmatch(r"[+-]?\d+", words[-1]) is not None
    return float(whole and int(words[-1]) == int(answer))


def short_answer(prediction: str, answer: str) -> float:
    """1 when the answer's number, to two decimals, or its text is in the last line said (MMMU's open questions)."""
    lines = prediction.strip().splitlines()
    last = lines[-1] if lines else ""
    wanted = _values(answer)
    if wanted and re.fullmatch(_NUMBER.pattern, answer.strip().replace("%", "")):
        return float(round(wanted[0], 2) in [round(value, 2) for value in _values(last)])
    return float(bool(norm(answer)) and norm(answer) in norm(last))
