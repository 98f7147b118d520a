"""What every RULER task is made of before it is measured, and the texts that needles are hidden in."""

from dataclasses import dataclass

import numpy as np

from retention.tasks.filler import DOES, WHERE, WHO, WORDS

DEPTHS = np.linspace(0, 1, 40)
"""Where needles may lie in the haystack."""
NOISE = "The grass grows. The rain falls. The wind turns. We walk up the hill and down again."


@dataclass
class Draft:
    """Units of text in order, which of them are evidence, and the question with its answers."""

    units: list[str]
    evidence: list[int]
    question: str
    answers: list[str]
    new_tokens: int
    scorer: str = "contains_all"


@dataclass(frozen=True)
class Draw:
    """What a task draws from: the example's randomness, split and style, the haystack's units, and the length aimed at."""

    rng: np.random.Generator
    split: str
    style: str
    units: int
    n_tokens: int


def haystack(draw: Draw, kind: str) -> list[str]:
    """Units of `noise` (always the same) or `prose` (sentences, or words of the embedded model)."""
    rng = draw.rng
    if draw.style == "symbolic":
        return [WORDS[-1] if kind == "noise" else WORDS[int(i)] for i in rng.integers(len(WORDS), size=draw.units)]
    if kind == "noise":
        return [NOISE] * draw.units
    parts = (WHO[draw.split], DOES, WHERE)
    chosen = zip(*(rng.integers(len(part), size=draw.units).tolist() for part in parts), strict=True)
    return [" ".join(part[i] for part, i in zip(parts, row, strict=True)) + "." for row in chosen]


def hidden(draw: Draw, hay: list[str], needles: list[str], *, in_order: bool = False) -> tuple[list[str], list[int]]:
    """The haystack with needles at distinct depths; returns its units and where each needle lies among them."""
    depths = draw.rng.permutation(DEPTHS)[: len(needles)]
    depths = np.sort(depths) if in_order else depths
    at = [round(float(depth) * len(hay)) for depth in depths]
    units, places = list(hay), [0] * len(needles)
    for shift, i in enumerate(sorted(range(len(needles)), key=lambda i: (at[i], i))):
        places[i] = at[i] + shift
        units.insert(places[i], needles[i])
    return units, places
