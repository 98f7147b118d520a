"""Where evidence lies: cells of images as visual tokens, stretches of text as marked segments."""

from collections.abc import Sequence
from dataclasses import replace
from math import isqrt

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from retention.data.example import EvidenceRef, Example, Segment, TextRef


def token_grids(example: Example, visual: Bool[Tensor, " tokens"]) -> Int[np.ndarray, "images side side"] | None:
    """Positions of the visual tokens as one square per image; None where they do not form such squares."""
    places = torch.nonzero(visual).flatten().tolist()
    images = example.images
    if not images or example.meta.get("grid") is None or len(places) % len(images):
        return None
    per_image = len(places) // len(images)
    side = isqrt(per_image)
    return np.array(places).reshape(len(images), side, side) if side * side == per_image else None


def cell_tokens(grids: Int[np.ndarray, "images side side"], ref: EvidenceRef, grid: int) -> list[int]:
    """Tokens whose rectangle overlaps one cell of a `grid` x `grid` picture."""
    side = grids.shape[1]

    def span(cell: int) -> slice:
        return slice(cell * side // grid, max(-(-(cell + 1) * side // grid), cell * side // grid + 1))

    return grids[ref.image, span(ref.row), span(ref.column)].flatten().tolist()


def marked(example: Example, ref: TextRef, marks: Sequence[str]) -> Example:
    """The example with a mark on either side of a stretch of text, to find it in what a chat template makes of it."""
    text = example.segments[ref.segment].payload
    told = text[: ref.start] + marks[0] + text[ref.start : ref.end] + marks[1] + text[ref.end :]
    segments = [Segment("text", told) if i == ref.segment else x for i, x in enumerate(example.segments)]
    return replace(example, segments=segments)
