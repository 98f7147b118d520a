"""Keyed needles asked about long after they were seen: a second prompt comes in between and is evicted too.

The context is evicted before the second prompt arrives, and what is left of it competes with that prompt for
the budget. The second prompt may be images with needles of their own, which nobody asks about, text, or both.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from retention.data.example import Example, Segment
from retention.tasks.filler import filler
from retention.tasks.needles import Needles
from retention.tasks.scene import N_KEYS, draw_scene, enlarged
from retention.types import require


@dataclass
class Recall(Needles):
    """Needles with a second prompt of images or text between context and questions."""

    name: ClassVar[str] = "recall"

    filler_images: int = 16
    """Images of the second prompt."""
    filler_needles: int = 24
    """Needles in them, with keys that the context does not have and that are never asked."""
    filler_words: int = 0
    """Words of text behind those images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        most = max(0, min(N_KEYS - self.n_needles, 8 * self.filler_images))
        checks = (
            (min(self.filler_images, self.filler_words) >= 0, "task.filler_images and filler_words of 0 or more", -1),
            (self.filler_images + self.filler_words >= 1, "task.filler_images or filler_words of at least 1", 0),
            (0 <= self.filler_needles <= most, f"task.filler_needles between 0 and {most}", self.filler_needles),
        )
        require(checks)

    def example(
        self, seed: int, split: str, index: int, *, style: str = "symbolic", n_turns: int | None = None
    ) -> Example:
        """One context and its turns as in needles, with the second prompt in between."""
        context = super().example(seed, split, index, style=style, n_turns=n_turns)
        rng = self.rng(seed, split, index)
        used = self._keys(rng)
        rng = rng.spawn(1)[0]
        keys = rng.permutation(np.setdiff1d(np.arange(N_KEYS), used))[: self.filler_needles]
        later: list[Segment] = []
        if self.filler_images:
            scene = draw_scene(rng, keys, n_images=self.filler_images, split=split)
            later += [Segment("image", enlarged(image, self.cell_px)) for image in scene.images]
        if self.filler_words:
            later.append(Segment("text", " ".join(filler(rng, split, self.filler_words, style))))
        return replace(context, later=later)

    def _variant(self) -> str:
        return f"{super()._variant()}-{self.filler_images}x{self.filler_needles}-{self.filler_words}w"
