"""What one evaluation or training context is: segments, turns, and where the evidence lies."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

QUERY_POSITIONS = ("before", "after", "deferred_turn")
"""Where a question stands: before its context, after it, or after an earlier turn about something else."""


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
class Sampling:
    """How an answer is drawn: temperature, the smallest set of tokens with this probability, and the seed."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"expected a temperature above 0 and top_p within (0, 1], got {self.temperature} and {self.top_p}"
            )


@dataclass
class Limit:
    """The most tokens of context and first question together, and where what is more is taken away.

    From the middle of all of it, or from the start of what follows the first `kept` segments; questions stay whole.
    """

    tokens: int
    where: str = "middle"
    kept: int = 0

    def __post_init__(self) -> None:
        if self.where not in ("middle", "start") or self.tokens < 1:
            raise ValueError(
                f"expected a limit of at least 1 token, at the middle or the start, got {self.tokens} at {self.where!r}"
            )


@dataclass
class Turn:
    """One question with its answer; `question` is what the model reads, in words of its prompt style."""

    question: str
    answer: str | list[str]
    """The reference, or several: any of them, or all, as the scorer has it."""
    evidence: list[EvidenceRef | TextRef] = field(default_factory=list)
    scorer: str = "symbol"
    max_new_tokens: int = 1
    needs_all: bool = True
    scored: bool = True
    choices: list[str] | None = None
    """Texts of the options, or names of the classes, where the scorer asks for them."""
    told: str | None = None
    """How a right answer is worded, where that is not the answer or the first of several."""
    cue: str = "Answer:"
    """What follows the context where the question stands before it."""

    @property
    def reference(self) -> str:
        """A right answer in words, for training and for whoever looks at answers in advance."""
        if self.told is not None:
            return self.told
        return self.answer if isinstance(self.answer, str) else next(iter(self.answer), "")


@dataclass
class Example:
    """One context with its turns; unique and reproducible on its own (`id` names seed and index)."""

    id: str
    segments: list[Segment]
    turns: list[Turn]
    query_position: str
    meta: dict[str, Any] = field(default_factory=dict)
    asked_behind: int = 0
    """Segments of the context that come before the question, where the question stands before the others."""
    later: list[Segment] = field(default_factory=list)
    """A second prompt on the same cache, read after the context was evicted and before any question."""
    plain: bool = False
    """Text to be continued, without the chat template."""
    independent: bool = False
    """Every turn is asked of the cache as the context left it, instead of behind the turns before it."""
    evicts_answers: bool = False
    """The budget holds while answers are written (`cache.evict_every`), instead of question and answer on top of it."""
    sampling: Sampling | None = None
    """How answers are drawn; None takes the likeliest token."""
    limit: Limit | None = None
    """How long the prompt may be; None leaves it as it is."""
    stretch: float = 1.0
    """What rotary positions are multiplied by while the example is read and answered."""

    def __post_init__(self) -> None:
        if self.query_position not in QUERY_POSITIONS:
            raise ValueError(
                f"expected a query_position among {', '.join(QUERY_POSITIONS)}, got {self.query_position!r}"
            )

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
