"""Mathematical answers: what a solution ends with, and whether two expressions mean the same."""

import re

from retention.tasks.scorers.expression import UnreadableError, same_value
from retention.tasks.scorers.text import norm

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_WORDS = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}(?:\^\{?[23]\}?)?")
_OPEN, _CLOSE = "([{", ")]}"


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, braces inside it kept."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    start, depth = text.index("{", start) + 1, 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


def final_answer(text: str) -> str | None:
    """The last boxed answer, else the last number; None without either."""
    found = boxed(text)
    if found is not None:
        return found
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def plain(latex: str) -> str:
    """LaTeX without what only looks: sizes, spaces, units, dollar and degree signs, words around."""
    text = re.sub(r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|,|;|!|:|quad|qquad)(?![a-zA-Z])", "", latex)
    bare = _WORDS.sub("", text)
    text = bare if any(c.isdigit() for c in bare) else _WORDS.sub(r" \1 ", text)  # units go, answers in words stay
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\\\$|\$|\\ |~", "", text)
    text = (
        text.replace("\\%", "%").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\cfrac", "\\frac")
    )
    text = text.replace("\\{", "{").replace("\\}", "}").replace("\\lbrace", "{").replace("\\rbrace", "}")
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text).strip().rstrip(".").strip()


def _parts(text: str) -> list[str]:
    """A tuple, set, interval or list cut at its commas, its brackets kept as an item; one item for anything else."""
    outer = text[:1] in _OPEN and text[-1:] in _CLOSE and _closes(text) == len(text) - 1
    inside = text[1:-1] if outer else text
    cuts, depth = [-1], 0
    for place, character in enumerate(inside):
        depth += (character in _OPEN) - (character in _CLOSE)
        if character == "," and depth == 0:
            cuts.append(place)
    if len(cuts) == 1:
        return [text]
    items = [inside[a + 1 : b].strip() for a, b in zip(cuts, [*cuts[1:], len(inside)], strict=True)]
    return [text[0] + text[-1] if outer else "", *items]


def _closes(text: str) -> int:
    """Where the bracket that a text begins with is closed; half-open intervals close theirs with another one."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return place
    return -1


def _same(said: str, wanted: str) -> bool:
    """Whether two answers without commas are the same text or mean the same."""
    said, wanted = (text.split("=")[-1].strip() if text.count("=") == 1 else text for text in (said, wanted))
    if re.sub(r"\s", "", said) == re.sub(r"\s", "", wanted) or norm(said) == norm(wanted):
        return True
    try:
        return same_value(said, wanted)
    except UnreadableError:
        return False


def math_equiv(prediction: str, answer: str) -> float:
    r"""1 when the final answer of a solution means the same as the reference's.

    Equal as plain text, or equal in value at random values of its variables: an identity is not proved but met, which
    takes no time-out. Tuples and intervals item by item, sets and lists in any order.
    """
    found, known = final_answer(prediction), boxed(answer)
    if found is None:
        return 0.0
    said, wanted = _parts(plain(found)), _parts(plain(answer if known is None else known))
    if len(said) != len(wanted) or (len(said) > 1 and said[0] != wanted[0]):
        return 0.0
    if len(said) > 1 and said[0] in ("", "{}"):
        rest = said[1:]
        for item in wanted[1:]:
            match = next((other for other in rest if _same(other, item)), None)
            if match is None:
                return 0.0
            rest.remove(match)
        return 1.0
    return float(all(_same(a, b) for a, b in zip(said, wanted, strict=True)))
