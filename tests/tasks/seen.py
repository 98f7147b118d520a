"""What a keeper has left of an example: cells and characters it kept, everything else unknown."""

import re
from dataclasses import dataclass

import numpy as np

from retention.data.example import EvidenceRef
from retention.tasks import boards, scene
from retention.tasks.scene import DIGIT0, KEY0, N_KEYS, key_name

HIDDEN = "\u2591"


@dataclass
class Seen:
    """`boards` holds words, None where a cell was not kept; `text` holds all text, hidden where it was not."""

    boards: np.ndarray
    text: str

    def pairs(self):
        """(board, row, column, word, word to the right) of neighbours that are both known."""
        for n, row, column in np.ndindex(*self.boards.shape):
            if column + 1 < self.boards.shape[2]:
                left, right = self.boards[n, row, column : column + 2]
                if left and right:
                    yield n, row, column, left, right

    def where(self, word):
        """(board, row, column) of all cells that are known to show a word."""
        return [place for place in np.ndindex(*self.boards.shape) if self.boards[place] == word]


class Recorder:
    """Takes the painter's place: keeps the words of boards and paints nothing."""

    def __init__(self, monkeypatch):
        self.words = None
        monkeypatch.setattr(boards, "paint", self._boards)
        monkeypatch.setattr(scene, "_paint", self._cells)

    def _boards(self, rng, words, **_):
        self.words = words.copy()
        return np.zeros((len(words), 8 * words.shape[1], 8 * words.shape[2], 3), np.uint8)

    def _cells(self, rng, cells, *_):
        if self.words is None:  # a second prompt comes after the context
            self.words = np.vectorize(_word, otypes=[object])(cells)
        return np.zeros((len(cells), 32, 32, 3), np.uint8)

    def example(self, task, index, split="test", style="natural", seed=0):
        """An example with the words of its boards."""
        self.words = None
        found = task.example(seed, split, index, style=style)
        return found, np.empty((0, 1, 1), object) if self.words is None else self.words


def _word(cell):
    if KEY0 <= cell < KEY0 + N_KEYS:
        return "-".join(key_name(int(cell) - KEY0))
    return str(cell - DIGIT0) if DIGIT0 <= cell < KEY0 else ""


def units(example, words):
    """All that a context consists of: cells of boards and words of text, as evidence would name them."""
    cells = [("cell", *place) for place in np.ndindex(*words.shape)]
    told = [
        ("text", i, m.start(), m.end())
        for i, segment in enumerate(example.segments)
        if segment.kind == "text"
        for m in re.finditer(r"\S+", segment.payload)
    ]
    return cells + told


def named(ref):
    if isinstance(ref, EvidenceRef):
        return "cell", ref.image, ref.row, ref.column
    return "text", ref.segment, ref.start, ref.end


def seen(example, words, kept):
    """What is left of an example when only these units are kept; boards of a second prompt come with the question."""
    left = np.full(words.shape, None, dtype=object)
    if example.later and (shown := example.meta["n_images"]) < len(words):
        left[shown:] = words[shown:]
    texts = [HIDDEN * len(s.payload) if s.kind == "text" else "" for s in example.segments]
    for kind, *at in kept:
        if kind == "cell":
            left[tuple(at)] = words[tuple(at)]
        else:
            i, start, end = at
            texts[i] = texts[i][:start] + example.segments[i].payload[start:end] + texts[i][end:]
    return Seen(left, " ".join(texts))
