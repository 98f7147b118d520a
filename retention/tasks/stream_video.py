"""A video whose events last a few frames: a key and its digit appear, stay, and are gone; which digit was it?

The background stands still, or moves on by a column per frame when the camera pans: then no frame repeats another.
The question may come in mid-stream: between two frames, about an event that has begun or about one still to come.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Turn
from retention.embedded import DECOYS
from retention.tasks import boards
from retention.tasks.context import Context, Ref
from retention.tasks.keyed import digit_turn, key_words
from retention.tasks.procedural import Check, Procedural
from retention.tasks.scene import GRID

LONGEST = 3
"""Most frames that an event lasts."""


@dataclass
class StreamVideo(Procedural):
    """`n_frames` frames with `n_events` events at random times; `n_turns` of them asked. Frames are images."""

    name: ClassVar[str] = "stream_video"
    chance: ClassVar[float] = 0.1
    styles: ClassVar[tuple[str, ...]] = ("symbolic", "natural")

    n_frames: int = 24
    """Frames of 4 x 4 cells."""
    n_events: int = 8
    """Keys with their digits, each visible in 1 to 3 frames in a row of its own."""
    n_turns: int = 4
    """Questions per context."""
    redundancy: float = 0.75
    """Share of the background's cells that a frame has in common with the one before."""
    pan: bool = False
    """Whether the background moves on by a column per frame."""
    asked_at: float = 0.0
    """Share of the frames that come before the question, where it stands before the others (`query_position: before`)."""

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy."""
        most, asked = GRID * (self.n_frames // (LONGEST + 1)), self.n_events - (self.query_position == "deferred_turn")
        return (
            *super().checks(),
            (1 <= self.n_events <= most, f"task.n_events between 1 and {most}", self.n_events),
            (1 <= self.n_turns <= asked, f"task.n_turns between 1 and {asked}", self.n_turns),
            (0 <= self.redundancy <= 1, "task.redundancy between 0 and 1", self.redundancy),
            (
                self.query_position != "before" or self.n_turns == 1,
                "task.n_turns of 1 with task.query_position before",
                self.n_turns,
            ),
            (0 <= self.asked_at < 1, "task.asked_at of 0 or more, below 1", self.asked_at),
            (
                self.asked_at == 0 or self.query_position == "before",
                "task.query_position before with task.asked_at above 0",
                self.query_position,
            ),
        )

    @property
    def n_asked(self) -> int:
        """Scored turns per context."""
        return self.n_turns

    def draw(self, rng: np.random.Generator, context: Context) -> list[Turn]:
        """Frames in order, then turns about distinct events."""
        context.still = not self.pan
        frames = self._background(rng)
        slots = rng.permutation(GRID * (self.n_frames // (LONGEST + 1)))[: self.n_events]
        events = []
        for key, slot in zip(key_words(rng, self.n_events), slots.tolist(), strict=True):
            start, row = divmod(slot, GRID)
            start, column = start * (LONGEST + 1), int(rng.integers(GRID - 1))
            lasts, digit = int(rng.integers(1, LONGEST + 1)), str(rng.integers(10))
            frames[start : start + lasts, row, column : column + 2] = key, digit
            events.append((key, digit, range(start, start + lasts), row, column))
        asked = round(self.asked_at * self.n_frames)
        for number, frame in enumerate(frames):
            if asked and number == asked:
                context.ask_here()
            context.show(frame)
        events = [events[i] for i in rng.permutation(len(events))]
        if asked:
            context.told["groups"] = {"event": "begun" if events[0][2].start < asked else "to come"}
        turns = []
        for key, digit, seen, row, column in events:
            refs: list[Ref] = [context.cell(t, row, column + i) for t in seen for i in (0, 1)]
            turn = digit_turn(key, digit, refs, context.style)
            turn.needs_all = len(seen) == 1
            turns.append(turn)
        return turns

    def variant(self) -> str:
        """Frames, events, turns, how the background behaves, and where the question stands among the frames."""
        moves, asked = "pan" if self.pan else "still", f"-at{self.asked_at:g}" if self.asked_at else ""
        return f"{self.n_frames}x{self.n_events}-{self.n_turns}t-{moves}{self.redundancy:g}{asked}"

    def _background(self, rng: np.random.Generator) -> boards.Words:
        """Decoys in a quarter of the cells; between frames some are drawn anew, or all move on."""
        frames = boards.blank(self.n_frames, GRID)
        for t, frame in enumerate(frames):
            fresh = np.where(rng.random((GRID, GRID)) < 0.25, rng.integers(len(DECOYS), size=(GRID, GRID)), -1)
            drawn = np.vectorize(lambda i: f"<decoy{i}>" if i >= 0 else "", otypes=[object])(fresh)
            before = np.roll(frames[t - 1], -self.pan, 1)
            frame[:] = np.where(rng.random((GRID, GRID)) < (self.redundancy if t else 0), before, drawn)
        return frames
