"""Few images beside much text: what becomes of either when a policy favours one modality.

Between the images stands text that says nothing, and in it facts about keys that no image shows. `ask` says
whether needles of the images, of the text, or of both are asked about.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from retention.data.example import Example, Segment, TextRef, Turn
from retention.tasks.depth import depths
from retention.tasks.filler import filler
from retention.tasks.needles import Needles
from retention.tasks.scene import N_KEYS, key_name
from retention.types import require

ASKED = ("images", "text", "both")


@dataclass
class TextHeavy(Needles):
    """Needles in few images and in the text between them."""

    name: ClassVar[str] = "text_heavy"

    n_images: int = 4
    """Images per context; text follows each."""
    n_needles: int = 8
    """Key-digit pairs in the images."""
    n_words: int = 240
    """Words that say nothing."""
    n_facts: int = 8
    """Key-digit pairs in the text."""
    ask: str = "images"
    """Which needles are asked about: images, text or both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = (
            (self.asked_colour is None, "task.asked_colour of null for text_heavy", self.asked_colour),
            (self.repeat == 0, "task.repeat of 0 for text_heavy", self.repeat),
            (self.ask in ASKED, f"task.ask among {', '.join(ASKED)}", self.ask),
            (self.n_words >= 16 * self.n_images, f"task.n_words of at least {16 * self.n_images}", self.n_words),
            (
                0 <= self.n_facts <= N_KEYS - self.n_needles,
                f"task.n_facts between 0 and {N_KEYS - self.n_needles}",
                self.n_facts,
            ),
        )
        require(checks)

    def example(
        self, seed: int, split: str, index: int, *, style: str = "symbolic", n_turns: int | None = None
    ) -> Example:
        """One context: images with text after each, then turns about distinct keys in random order."""
        pictured = super().example(seed, split, index, style=style, n_turns=self.n_needles)
        rng = self.rng(seed, split, index)
        used = self._keys(rng)
        rng = rng.spawn(1)[0]
        keys = rng.permutation(np.setdiff1d(np.arange(N_KEYS), used))[: self.n_facts].tolist()
        facts = [(key, int(rng.integers(10))) for key in keys]
        asked = rng.permutation(self._askable() or 0)[: self.n_turns if n_turns is None else n_turns]
        units: list[str | tuple[int, int]] = [*facts, *filler(rng, split, self.n_words, style)]
        segments: list[Segment] = []
        told: dict[int, Turn] = {}
        for image, own in zip(
            pictured.segments, np.array_split(rng.permutation(len(units)), self.n_images), strict=True
        ):
            text = ""
            for unit in (units[i] for i in own):
                start = len(text) + bool(text)
                if isinstance(unit, str):
                    text = f"{text} {unit}".strip()
                else:
                    key, digit = unit
                    text = f"{text} {_fact(key, digit, style)}".strip()
                    told[key] = _turn(key, digit, TextRef(len(segments) + 1, start, len(text)), style)
            segments += [image, Segment("text", text)]
        facts_turns = [told[key] for key in keys]
        turns = {"images": pictured.turns, "text": facts_turns, "both": [*pictured.turns, *facts_turns]}[self.ask]
        turns = [turns[i] for i in asked]
        others = self.n_needles + self.n_facts - len(turns)
        meta = pictured.meta | {"n_distractors": others, "depth": depths(turns, segments)}
        position = "deferred_turn" if len(turns) > 1 else "after"
        return replace(pictured, segments=segments, turns=turns, query_position=position, meta=meta)

    def _askable(self) -> int | None:
        return {"text": self.n_facts, "both": self.n_needles + self.n_facts}.get(self.ask, self.n_needles)

    def _variant(self) -> str:
        return f"{self.n_images}x{self.n_needles}-{self.n_words}w{self.n_facts}-{self.ask}"


def _fact(key: int, digit: int, style: str) -> str:
    colour, letter = key_name(key)
    return (
        f"{colour}-{letter} {digit}" if style == "symbolic" else f"The {colour} letter {letter} has the digit {digit}."
    )


def _turn(key: int, digit: int, ref: TextRef, style: str) -> Turn:
    colour, letter = key_name(key)
    natural = f"Which digit does the {colour} letter {letter} have? Answer with one digit."
    question = f"<ask> {colour}-{letter}" if style == "symbolic" else natural
    return Turn(question, str(digit), [ref], max_new_tokens=1 if style == "symbolic" else 8)
