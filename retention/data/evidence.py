"""Where evidence lies: cells of images as visual tokens, stretches of text as marked segments."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from retention.data.example import EvidenceRef, Example, Segment, TextRef


def token_grids(example: Example, visual: Bool[Tensor, " tokens"]) -> list[Int[np.ndarray, "images _ _"]] | None:
    """Positions of the visual tokens as squares, one per image; several where an image is shown in several resolutions.

    None where they do not form such squares: pictures with cells are square.
    """
    places = torch.nonzero(visual).flatten().numpy()
    images = example.images
    if not images or example.meta.get("grid") is None or len(places) % len(images):
        return None
    own = places.reshape(len(images), -1)
    return [own[:, grid] for grid in _squares(own.shape[1])] or None


def _squares(count: int) -> list[Int[np.ndarray, "_ _"]]:
    """How an image's tokens are laid out, by their number, finest square first; empty where they make up no known layout.

    One square, perhaps with a token that ends it; n x n tiles and an overview (InternVL, Idefics3); an overview and rows
    that end with a token each (LLaVA-NeXT).
    """
    order, side = np.arange(count), isqrt(count)
    if count - side * side in (0, 1):
        return [order[: side * side].reshape(side, side)]
    for n in range(2, side + 1):
        side = isqrt(count // (n * n + 1))
        if (n * n + 1) * side * side == count:
            tiles = order[: n * n * side * side].reshape(n, n, side, side).transpose(0, 2, 1, 3)
            return [tiles.reshape(n * side, n * side), order[n * n * side * side :].reshape(side, side)]
    for side in range(1, isqrt(count) + 1):
        wide = isqrt(count - side * side)
        if side * side + wide * (wide + 1) == count and wide % side == 0:
            rows = order[side * side :].reshape(wide, wide + 1)[:, :wide]
            return [rows, order[: side * side].reshape(side, side)]
    return []


def cell_tokens(grids: Sequence[Int[np.ndarray, "images _ _"]], ref: EvidenceRef, grid: int) -> list[int]:
    """Tokens whose rectangle overlaps one cell of a `grid` x `grid` picture, in every resolution."""
    found: list[int] = []
    for places in grids:
        side = places.shape[1]
        rows, columns = (
            slice(cell * side // grid, max(-(-(cell + 1) * side // grid), cell * side // grid + 1))
            for cell in (ref.row, ref.column)
        )
        found += places[ref.image, rows, columns].flatten().tolist()
    return found


@dataclass
class Words:
    """Tokens of a prompt's text: which characters each of them is, and where it lies among all tokens."""

    offsets: Int[np.ndarray, "words 2"]
    places: Int[np.ndarray, " words"]

    def span(self, start: int, end: int) -> list[int]:
        """Positions of the tokens that overlap a stretch of characters."""
        return self.places[(self.offsets[:, 0] < end) & (self.offsets[:, 1] > start)].tolist()


def aligned(own: Sequence[int], ids: Sequence[int]) -> list[int] | None:
    """Where the tokens of a text lie among those a processor made of it, which may have put others in between."""
    found: list[int] = []
    for place, token in enumerate(ids):
        if len(found) < len(own) and token == own[len(found)]:
            found.append(place)
    return found if len(found) == len(own) else None


def marked(example: Example, ref: TextRef, marks: Sequence[str]) -> Example:
    """The example with a mark on either side of a stretch of text, to find it in what a chat template makes of it."""
    text = example.segments[ref.segment].payload
    told = text[: ref.start] + marks[0] + text[ref.start : ref.end] + marks[1] + text[ref.end :]
    segments = [Segment("text", told) if i == ref.segment else x for i, x in enumerate(example.segments)]
    return replace(example, segments=segments)
