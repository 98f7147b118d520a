"""Does the image that holds one thing also hold another? Either of the two is worth nothing without the other.

`single`: one image holds the anchor. `multi`: two or three do; do all, or any, of them hold the target?
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Turn
from retention.tasks import boards
from retention.tasks.context import Context, Ref
from retention.tasks.further import Row, gap
from retention.tasks.names import one
from retention.tasks.procedural import Check, Procedural
from retention.tasks.scene import GRID

OTHERS = 3
"""Shapes per image that no question is about."""


@dataclass
class HaystackAnyAll(Procedural):
    """`n_images` images, some with the anchor; the target is in half of all images. Yes or no, half each."""

    name: ClassVar[str] = "haystack_any_all"
    chance: ClassVar[float] = 0.5

    kind: str = "single"
    """single or multi."""
    n_images: int = 10
    """Images per context."""
    only_anchors: bool = False
    """Whether images without an anchor are left out: what a perfect retriever would show."""

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy."""
        least = (1 if self.kind == "single" else 3) * (2 if self.query_position == "deferred_turn" else 1)
        return (
            *super().checks(),
            (self.kind in ("single", "multi"), "task.kind of single or multi", self.kind),
            (self.n_images >= least, f"task.n_images of at least {least}", self.n_images),
        )

    def paired(self) -> str:
        """What a context shares with the one of all images or of the anchors' alone."""
        return f"{self.kind}-{self.n_images}-{self.query_position}"

    @classmethod
    def further(cls, rows: Sequence[Row]) -> dict[str, float]:
        """What the other images cost, where contexts were also shown without: anchors alone, less all images."""
        cost = gap(rows, "shown", "anchors", "all")
        return super().further(rows) | ({} if cost is None else {"haystack_cost": cost})

    def draw(self, rng: np.random.Generator, context: Context) -> list[Turn]:
        """The images, then the question; when turns are deferred, another about other shapes in other images."""
        context.told["groups"] = {"shown": "anchors" if self.only_anchors else "all"}
        marks = [boards.MARKS[int(i)] for i in rng.permutation(len(boards.MARKS))]
        pairs, rest = [(marks[0], marks[1]), (marks[2], marks[3])], marks[4:]
        free = rng.permutation(self.n_images).tolist()
        plans = []
        for _ in range(2 if self.query_position == "deferred_turn" else 1):
            count = 1 if self.kind == "single" else int(rng.integers(2, 4))
            anchors, free = sorted(free[:count]), free[count:]
            plans.append((*self._plan(rng, count), anchors))
        shown = boards.blank(self.n_images, GRID)
        for (anchor, target), (_, _, holds, anchors) in zip(pairs, plans, strict=False):
            for image, board in enumerate(shown):
                own = image in anchors
                held = holds[anchors.index(image)] if own else bool(rng.integers(2))
                boards.scatter(rng, board, [anchor] * own + [target] * held)
        for board in shown:
            boards.scatter(rng, board, [rest[int(i)] for i in rng.integers(len(rest), size=OTHERS)])
        kept = sorted(image for plan in plans for image in plan[-1]) if self.only_anchors else range(self.n_images)
        numbers = {image: context.show(shown[image]) for image in kept}
        return [self._turn(context, shown, numbers, pair, plan) for pair, plan in zip(pairs, plans, strict=False)]

    def _plan(self, rng: np.random.Generator, count: int) -> tuple[str, bool, list[bool]]:
        """The form of the question, its answer, and which of the images with the anchor hold the target."""
        form = "one" if count == 1 else ("all", "any")[int(rng.integers(2))]
        yes = bool(rng.integers(2))
        some = int(rng.integers(1, max(2, count)))
        mixed = [int(i) < some for i in rng.permutation(count)]
        if form == "one" or (form == "all") == yes:
            return form, yes, [yes] * count
        return form, yes, mixed

    def _turn(
        self,
        context: Context,
        shown: boards.Words,
        numbers: dict[int, int],
        pair: tuple[str, str],
        plan: tuple[str, bool, list[bool], list[int]],
    ) -> Turn:
        anchor, target = (one(mark.replace("-", " ")) for mark in pair)
        form, yes, holds, anchors = plan
        question = {
            "one": f"Exactly one picture holds {anchor}. Does it hold {target} too? Answer yes or no.",
            "all": f"Exactly {len(anchors)} pictures hold {anchor}. Do all of them hold {target} too? Answer yes or no.",
            "any": f"Exactly {len(anchors)} pictures hold {anchor}. Does any of them hold {target} too? Answer yes or no.",
        }[form]
        telling = [image for image, held in zip(anchors, holds, strict=True) if held == yes]
        every = form == "one" or (form == "all") == yes
        evidence: list[Ref] = []
        for image in telling:
            board, number = shown[image], numbers[image]
            pairs = [
                context.cell(number, row, column)
                for mark in pair
                for row, column in np.argwhere(board == mark).tolist()
            ]
            evidence += pairs if yes else context.cells(number)
        needs = every or len(telling) == 1
        return Turn(question, "yes" if yes else "no", evidence, "yes_no", max_new_tokens=8, needs_all=needs)

    def variant(self) -> str:
        """Kind, images, and whether the others are left out."""
        return f"{self.kind}-{self.n_images}{'-anchors' if self.only_anchors else ''}"
