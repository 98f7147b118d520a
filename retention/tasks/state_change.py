"""A world of few cells over many frames: what has become of it, and what was seen in it?

`last_state`: the colour of a shape that changes. `shuffle`: where a ball is after cups were swapped. `direction`: where a
shape went. `existence`: whether a shape was ever there. Old states mislead whoever keeps them instead of the newest.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Turn
from retention.tasks import boards
from retention.tasks.context import Context
from retention.tasks.names import CHOICES, lettered, one
from retention.tasks.procedural import Check, Procedural

SIDE, BAND = 6, 3
CUPS = (0, 2, 4)
MOVES = {
    "up": (-1, 0),
    "down": (1, 0),
    "left": (0, -1),
    "right": (0, 1),
    "up and left": (-1, -1),
    "up and right": (-1, 1),
    "down and left": (1, -1),
    "down and right": (1, 1),
}
Place = tuple[int, int, int]
"""Frame, row and column."""
CHANCE = {
    "last_state": 1 / len(boards.PALETTE),
    "shuffle": 1 / len(CUPS),
    "direction": 1 / len(MOVES),
    "existence": 0.5,
}


@dataclass
class StateChange(Procedural):
    """`n_frames` frames of 6 x 6 cells; one subject in the upper half, one in the lower."""

    name: ClassVar[str] = "state_change"
    chance: ClassVar[float] = CHANCE["last_state"]

    kind: str = "last_state"
    """last_state, shuffle, direction or existence."""
    n_frames: int = 16
    """Frames per context; each is an image."""
    n_changes: int = 3
    """Changes of colour (last_state) or swaps (shuffle)."""
    at_end: bool = True
    """Whether the state in the last frame is asked for, or in a random one (last_state)."""

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy."""
        return (
            *super().checks(),
            (self.kind in CHANCE, f"task.kind among {', '.join(CHANCE)}", self.kind),
            (self.n_frames >= 2, "task.n_frames of at least 2", self.n_frames),
            (
                1 <= self.n_changes < self.n_frames,
                f"task.n_changes between 1 and {self.n_frames - 1}",
                self.n_changes,
            ),
            (
                self.kind != "existence" or self.query_position != "deferred_turn",
                "task.query_position before or after for existence: that nothing was there all cells tell",
                self.query_position,
            ),
        )

    @property
    def guess(self) -> float:
        """A colour, a cup, a direction, or yes and no."""
        return CHANCE[self.kind]

    def draw(self, rng: np.random.Generator, context: Context) -> list[Turn]:
        """The frames, then turns about the upper and the lower subject."""
        context.still = True
        frames = boards.blank(self.n_frames, SIDE)
        subject = {
            "last_state": self._coloured,
            "shuffle": self._shuffled,
            "direction": self._moved,
            "existence": self._existed,
        }[self.kind]
        names = [boards.SHAPES[int(i)] for i in rng.permutation(len(boards.SHAPES))]
        told = [subject(rng, frames, half, names) for half in ((0, 1) if self.kind != "existence" else (0,))]
        self._scenery(rng, frames)
        for frame in frames:
            context.show(frame)
        every = [(t, row, column) for t, row, column in np.ndindex(*frames.shape)]
        turns = []
        for turn, places in told:
            turn.evidence = [context.cell(*place) for place in places or every]
            turns.append(turn)
        order = rng.permutation(len(turns))
        return [turns[int(i)] for i in order]

    def variant(self) -> str:
        """Kind, frames and changes."""
        return f"{self.kind}-{self.n_frames}-{self.n_changes}{'' if self.at_end else '-inside'}"

    def _coloured(
        self, rng: np.random.Generator, frames: boards.Words, half: int, names: list[str]
    ) -> tuple[Turn, list[Place]]:
        """A shape that stays in its cell and changes colour; what tells are its cells since the last change."""
        shape, row, column = names[half], half * BAND + int(rng.integers(BAND)), int(rng.integers(SIDE))
        changes = sorted((1 + rng.permutation(self.n_frames - 1)[: self.n_changes]).tolist())
        colours = list(boards.PALETTE)
        now, states = int(rng.integers(len(colours))), []
        for t in range(self.n_frames):
            if t in changes:
                now = (now + int(rng.integers(1, len(colours)))) % len(colours)
            states.append(colours[now])
            frames[t, row, column] = f"{colours[now]}-{shape}"
        at = self.n_frames - 1 if self.at_end else int(rng.integers(self.n_frames))
        since = max((t for t in changes if t <= at), default=0)
        when = "in the last picture" if self.at_end else f"in picture {at + 1}, counted from 1"
        question = f"What colour is the {shape} {when}? Answer with one word out of {', '.join(colours)}."
        turn = Turn(question, states[at], max_new_tokens=8, needs_all=since == at)
        return turn, [(t, row, column) for t in range(since, at + 1)]

    def _shuffled(
        self, rng: np.random.Generator, frames: boards.Words, half: int, names: list[str]
    ) -> tuple[Turn, list[Place]]:
        """A ball under one of three cups of a colour, seen in the first picture; crosses mark the two cups of a swap."""
        colour, row = ("red", "blue")[half], half * BAND + 1
        ball = int(rng.integers(len(CUPS)))
        frames[0, row, CUPS[ball]] = f"{colour}-circle"
        places = [(0, row, CUPS[ball])]
        for t in sorted((1 + rng.permutation(self.n_frames - 1)[: self.n_changes]).tolist()):
            pair = rng.permutation(len(CUPS))[:2].tolist()
            for cup in pair:
                frames[t, row, CUPS[cup]] = f"{colour}-cross"
                places.append((t, row, CUPS[cup]))
            ball = pair[1 - pair.index(ball)] if ball in pair else ball
        question = (
            f"The {colour} circle of the first picture lies under the first, second or third cup of its row. In "
            f"{self.n_changes} later pictures two {colour} crosses show which two cups change places. "
            "Under which cup is it in the end? Answer 1, 2 or 3."
        )
        return Turn(question, str(ball + 1), max_new_tokens=8), places

    def _moved(
        self, rng: np.random.Generator, frames: boards.Words, half: int, names: list[str]
    ) -> tuple[Turn, list[Place]]:
        """A shape seen in two pictures in a row, one cell further in the second."""
        shape, t = names[half], int(rng.integers(self.n_frames - 1))
        way = int(rng.integers(len(MOVES)))
        row, column = half * BAND + 1, int(rng.integers(1, SIDE - 1))
        down, right = list(MOVES.values())[way]
        places = [(t, row, column), (t + 1, row + down, column + right)]
        for place in places:
            frames[place] = f"{list(boards.PALETTE)[half]}-{shape}"
        question = f"Which way does the {shape} move? {lettered(list(MOVES))} Answer with one letter."
        return Turn(question, CHOICES[way], scorer="choice_letter", max_new_tokens=8, choices=list(MOVES)), places

    def _existed(
        self, rng: np.random.Generator, frames: boards.Words, half: int, names: list[str]
    ) -> tuple[Turn, list[Place]]:
        """A shape in one picture or in none, among others of the same shape or colour; none, when all cells tell."""
        colours = list(boards.PALETTE)
        colour, shape, there = int(rng.integers(len(colours))), names[0], bool(rng.integers(2))
        places: list[Place] = []
        if there:
            row, column = (int(x) for x in rng.integers(SIDE, size=2))
            places = [(int(rng.integers(self.n_frames)), row, column)]
            frames[places[0]] = f"{colours[colour]}-{shape}"
        for t in range(self.n_frames):
            other = colours[(colour + int(rng.integers(1, len(colours)))) % len(colours)]
            near = (f"{other}-{shape}", f"{colours[colour]}-{names[1]}")[int(rng.integers(2))]
            boards.scatter(rng, frames[t], [near])
        question = f"Does any picture show {one(colours[colour])} {shape}? Answer yes or no."
        return Turn(question, "yes" if there else "no", scorer="yes_no", max_new_tokens=8), places

    def _scenery(self, rng: np.random.Generator, frames: boards.Words) -> None:
        """A few letters that stand in the same cells of all pictures."""
        free = np.argwhere((frames == "").all(0))
        for row, column in rng.permutation(free)[:3]:
            frames[:, row, column] = f"white-{CHOICES[int(rng.integers(26))]}"
