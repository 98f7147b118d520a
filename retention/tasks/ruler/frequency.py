"""Words to be counted over the whole text: the ten that are common in a list, the most frequent of coded words."""

import numpy as np

from retention.tasks.names import coined
from retention.tasks.ruler.draft import Draft, Draw

COMMON, SHORT = 10, 4096
"""Common words of a list, and the length in tokens below which words are repeated less."""
ASKED, ALPHA, TOKENS_PER_WORD = 3, 2.0, 50
DOTS = "..."


def common_words(draw: Draw) -> Draft:
    """A numbered list in random order, after a short one with its answer; the haystack's units are the other words."""
    often, seldom = (30, 3) if draw.n_tokens >= SHORT else (6, 1)
    words = coined(draw.rng, draw.split, 3 * COMMON + draw.units)
    shown, shown_others, common, others = np.split(np.array(words), [COMMON, 2 * COMMON, 3 * COMMON])
    example = _listed(draw, [*np.repeat(shown, 3), *shown_others])
    lists = _listed(draw, [*np.repeat(common, often), *np.repeat(others, seldom)])
    answer = ", ".join(shown.tolist())
    ask = "The ten words that are most often in this list are"
    units = ["First list:", *example, f"{ask} {answer}.", "Second list:", *lists]
    names, start = set(common.tolist()), len(units) - len(lists)
    evidence = [start + i for i, item in enumerate(lists) if item.split(". ")[1] in names]
    question = f"Which ten words are most often in the second list? {ask}"
    return Draft(units, evidence, question, common.tolist(), 120)


def frequent_words(draw: Draw) -> Draft:
    """Coded words whose counts fall with the square of their rank; the most frequent is dots, ranks 2 to 4 are asked."""
    size = max(ASKED + 2, draw.n_tokens // TOKENS_PER_WORD)
    words = [DOTS, *(_coded(draw, size - 1))]
    weights = np.arange(1, size + 1, dtype=float) ** -ALPHA
    counts = np.floor(draw.units * weights / weights.sum()).astype(int)
    counts[: ASKED + 1] += np.arange(ASKED + 1, 0, -1)  # no tie among what is asked, however short the text
    units = draw.rng.permutation(np.repeat(words, counts)).tolist()
    wanted = words[1 : 1 + ASKED]
    evidence = [i for i, unit in enumerate(units) if unit in wanted]
    question = (
        f"The text consists of coded words; the dots mean nothing. Which {ASKED} coded words are the most frequent? "
        f"The {ASKED} most frequent coded words are"
    )
    return Draft(units, evidence, question, wanted, 50)


def _listed(draw: Draw, words: list[str]) -> list[str]:
    """Words in random order as items of a numbered list."""
    return [f"{i + 1}. {word}" for i, word in enumerate(draw.rng.permutation(words).tolist())]


def _coded(draw: Draw, count: int) -> list[str]:
    """Distinct words of six letters; the first tells the split."""
    return [f"{word[:6]}" for word in _distinct(draw, count)]


def _distinct(draw: Draw, count: int) -> list[str]:
    found: dict[str, str] = {}
    while len(found) < count:
        for word in coined(draw.rng, draw.split, count, 3):
            found.setdefault(word[:6], word)
    return list(found.values())[:count]
