"""A key stands in many images with digits that disagree: which digit stands beside it most often?

The answer is spread over all its occurrences and any one of them may mislead: whoever keeps a single one, drawn
fairly, is right `votes / (votes + others)` of the time.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import EvidenceRef, Example, Segment, TextRef, Turn
from retention.tasks.base import Task
from retention.tasks.depth import depths
from retention.tasks.scene import GRID, N_KEYS, Needle, draw_scene, enlarged
from retention.types import require


@dataclass
class Majority(Task):
    """Each of `n_keys` keys `votes` times with one digit and once with each of `others` different ones."""

    name: ClassVar[str] = "majority"
    chance: ClassVar[float] = 0.1

    n_images: int = 16
    """Images per context, each 4 x 4 cells."""
    n_keys: int = 4
    """Keys per context."""
    votes: int = 5
    """Occurrences of a key beside its most frequent digit."""
    others: int = 5
    """Occurrences beside other digits, all different."""
    n_turns: int = 4
    """Questions per context, about distinct keys."""
    cell_px: int = 8
    """Pixels per cell: 8 for the embedded model, patch x merge (28 or 32) for others."""

    def __post_init__(self) -> None:
        cells, most = self.n_keys * (self.votes + self.others), min(N_KEYS, 8 * self.n_images)
        checks = (
            (self.votes >= 2, "task.votes of at least 2", self.votes),
            (0 <= self.others <= 9, "task.others between 0 and 9", self.others),
            (1 <= self.n_keys <= N_KEYS, f"task.n_keys between 1 and {N_KEYS}", self.n_keys),
            (cells <= 8 * self.n_images, f"at most {most} occurrences in {self.n_images} images", cells),
            (1 <= self.n_turns <= self.n_keys, f"task.n_turns between 1 and {self.n_keys}", self.n_turns),
            (self.cell_px >= 8, "task.cell_px of at least 8", self.cell_px),
        )
        require(checks)

    def example(
        self, seed: int, split: str, index: int, *, style: str = "symbolic", n_turns: int | None = None
    ) -> Example:
        """One context: images, then turns about distinct keys in random order."""
        rng = self.rng(seed, split, index)
        chosen = rng.permutation(N_KEYS)[: self.n_keys]
        digits = np.stack([rng.permutation(10)[: 1 + self.others] for _ in chosen])
        votes = np.concatenate([np.repeat(digits[:, :1], self.votes, 1), digits[:, 1:]], 1)
        order = rng.permutation(votes.size)
        keys = np.repeat(chosen, votes.shape[1])[order]
        scene = draw_scene(rng, keys, n_images=self.n_images, split=split, digits=votes.flatten()[order])
        turns = [
            _turn([x for x in scene.needles if x.key == key], str(digit), style)
            for key, digit in zip(chosen, digits[:, 0], strict=True)
        ][: self.n_turns if n_turns is None else n_turns]
        variant = f"{self.n_images}x{self.n_keys}-{self.votes}of{votes.shape[1]}"
        segments = [Segment("image", enlarged(image, self.cell_px)) for image in scene.images]
        return Example(
            id=f"{self.name}/{variant}/{split}/{seed}/{index}",
            segments=segments,
            turns=turns,
            query_position="deferred_turn" if len(turns) > 1 else "after",
            meta={
                "n_images": self.n_images,
                "grid": GRID,
                "variant": variant,
                "chance": self.chance,
                "one_vote": self.votes / votes.shape[1],
                "n_distractors": len(scene.needles) - len(turns) * votes.shape[1],
                "depth": depths(turns, segments),
            },
        )


def _turn(occurrences: list[Needle], digit: str, style: str) -> Turn:
    colour, letter = occurrences[0].name
    natural = f"Which digit is most often in the cell right of a {colour} letter {letter}? Answer with one digit."
    question = f"<ask> {colour}-{letter}" if style == "symbolic" else natural
    cells: list[EvidenceRef | TextRef] = [
        EvidenceRef(x.image, x.row, x.column + i) for x in occurrences for i in (0, 1)
    ]
    return Turn(question, digit, cells, max_new_tokens=1 if style == "symbolic" else 8, needs_all=False)
