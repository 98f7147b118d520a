"""Coined names and values for texts: none of one split is ever drawn in another."""

import numpy as np

from retention.tasks.base import SPLITS

ONSETS = {"train": "bdfghp", "val": "klm", "test": "nrstvz"}
INNER = "bdfgklmnprstvz"
VOWELS = "aeiou"
CHOICES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def coined(rng: np.random.Generator, split: str, count: int, syllables: int = 2) -> list[str]:
    """Distinct lower-case words of consonant-vowel syllables whose first letter tells the split, closed by a consonant."""
    found: dict[str, None] = {}
    while len(found) < count:
        inner, vowels = rng.integers(len(INNER), size=syllables), rng.integers(len(VOWELS), size=syllables)
        onset = ONSETS[split][int(rng.integers(len(ONSETS[split])))]
        letters = [onset, *(INNER[int(i)] for i in inner)]
        found["".join(c + VOWELS[int(v)] for c, v in zip(letters, vowels, strict=False)) + letters[-1]] = None
    return list(found)


def number(rng: np.random.Generator, split: str, digits: int) -> str:
    """A number of so many digits, the first not 0, that leaves the split's own remainder when divided by three."""
    first = 10 ** (digits - 1) + int(rng.integers(9 * 10 ** (digits - 1)))
    moved = first - (first - SPLITS.index(split)) % 3
    return str(moved if moved >= 10 ** (digits - 1) else moved + 3)


def one(word: str) -> str:
    """A word behind its article: `a red star`, `an orange star`."""
    return f"{'an' if word[0] in VOWELS else 'a'} {word}"


def lettered(options: list[str]) -> str:
    """Options as one line: `A. this B. that`."""
    return " ".join(f"{letter}. {option}" for letter, option in zip(CHOICES, options, strict=False))
