"""Answers that are lists of numbers or words: in order, in part, or as coordinates."""

import ast
import re
from collections.abc import Sequence

from retention.tasks.scorers.text import norm


def read_list(text: str) -> list[str] | None:
    """The items of the first list in brackets, or of a text that is nothing but items between commas; else None."""
    inside = re.search(r"\[([^\[\]]*)\]", text)
    told = inside[1] if inside else text.strip().rstrip(".")
    if inside is None and not re.fullmatch(r"[\w'\"-]+(\s*,\s*[\w'\"-]+)*", told):
        return None
    items = [norm(_unquoted(item)) for item in told.split(",")]
    return items if all(items) else None


def _unquoted(item: str) -> str:
    item = item.strip()
    if len(item) > 1 and item[0] == item[-1] and item[0] in "'\"":
        return str(ast.literal_eval(item)) if "\\" not in item else item[1:-1]
    return item


def _gold(answers: Sequence[str]) -> list[str]:
    """Reference items: given one by one, or as one text that holds a list."""
    if len(answers) == 1:
        return read_list(answers[0]) or [norm(answers[0])]
    return [norm(answer) for answer in answers]


def list_soft(prediction: str, answers: Sequence[str]) -> float:
    """Share of the reference items that stand at their places; 0 where no list can be read (MM-NIAH's counting)."""
    said, wanted = read_list(prediction), _gold(answers)
    if said is None:
        return 0.0
    return sum(a == b for a, b in zip(said, wanted, strict=False)) / len(wanted)


def list_exact(prediction: str, answers: Sequence[str]) -> float:
    """1 when every item is right and there are no others."""
    return float(read_list(prediction) == _gold(answers))


def integers(text: str) -> list[int]:
    """Whole numbers of a text in order."""
    return [int(number) for number in re.findall(r"-?\d+", text)]


def index_triplet(prediction: str, answer: str) -> float:
    """1 when image, row and column are the answer's, or the first number is -1 where the answer is (absent)."""
    wanted = integers(answer)
    return float(integers(prediction)[: len(wanted)] == wanted)


def index_only(prediction: str, answer: str) -> float:
    """1 when the image alone, the first number, is the answer's."""
    return float(integers(prediction)[:1] == integers(answer)[:1])


def numbers_share(prediction: str, answer: str) -> float:
    """Share of the numbers said that are the answer's (LongBench's counting and passage retrieval)."""
    said, wanted = re.findall(r"\d+", prediction), re.findall(r"\d+", answer)
    return sum(number == wanted[0] for number in said) / len(said) if said and wanted else 0.0


def list_start(prediction: str, answers: Sequence[str]) -> float:
    """Share of the reference numbers met from the first on, until one is wrong (InfiniteBench's Math.Calc)."""
    said, right = re.findall(r"\d+", prediction), 0
    for a, b in zip(said, answers, strict=False):
        if a != b.lstrip("-"):
            break
        right += 1
    return right / len(answers)
