"""What one evaluation or training context is: segments, turns, and where the evidence lies."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass
class Segment:
    """One piece of the context, in order: a text or an image (uint8 [height, width, 3])."""

    kind: str
    payload: Any

    def __post_init__(self) -> None:
        if self.kind not in ("text", "image"):
            raise ValueError(f"expected a segment of kind 'text' or 'image', got {self.kind!r}")


@dataclass
class EvidenceRef:
    """A cell of an image that an answer depends on: image index, row and column of the cell grid."""

    image: int
    row: int
    column: int


@dataclass
class TextRef:
    """A stretch of a text segment that an answer depends on: segment index, first character, one past the last."""

    segment: int
    start: int
    end: int


@dataclass
class Turn:
    """One question with its answer; `question` is what the model reads, in words of its prompt style."""

    question: str
    answer: str
    evidence: list[EvidenceRef | TextRef] = field(default_factory=list)
    scorer: str = "symbol"
    max_new_tokens: int = 1
    needs_all: bool = True
    scored: bool = True


@dataclass
class Example:
    """One context with its turns; unique and reproducible on its own (`id` names seed and index)."""

    id: str
    segments: list[Segment]
    turns: list[Turn]
    query_position: str
    meta: dict[str, Any] = field(default_factory=dict)
    later: list[Segment] = field(default_factory=list)
    """A second prompt on the same cache, read after the context was evicted and before any question."""

    @property
    def images(self) -> list[np.ndarray]:
        """The context's images, uint8 [height, width, 3] each."""
        return [segment.payload for segment in self.segments if segment.kind == "image"]

    @property
    def n_turns(self) -> int:
        """Number of turns."""
        return len(self.turns)

    def whole(self) -> "Example":
        """The same example with context and second prompt as one prompt."""
        return replace(self, segments=[*self.segments, *self.later], later=[])
