"""Where visual tokens lie: image, frame, row and column of every patch, from the grids a processor hands over."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from retention.models.family import VISUAL_TOKENS, Family

GRIDS = ("image_grid_thw", "video_grid_thw")
"""Inputs that tell frames, rows and columns before patches are merged, in the order of `VISUAL_TOKENS`."""

SQUARES = ("image_seq_length", "mm_tokens_per_image")
"""Attributes of a config that hold the number of tokens of an image (or a tile); 1 where images are of any size."""


def patch_places(
    family: Family, config: Any, ids: Int[Tensor, "batch tokens"], given: Mapping[str, Any]
) -> Int[Tensor, "batch tokens 4"] | None:
    """Of a forward's tokens: image, frame, row and column after patches are merged, image -1 for what is no patch.

    `given` holds the inputs of the model. None where the family, or the inputs, do not tell every patch.
    """
    if family.grid == "unknown":
        return None
    places, number = torch.full((*ids.shape, 4), -1, dtype=torch.int16, device=ids.device), 0
    for name, key in zip(VISUAL_TOKENS, GRIDS, strict=True):
        mine = ids == getattr(config, name, -1)
        grids = _grids(family, config, int(mine.sum()), given.get(key))
        if grids is None:
            return None
        for t, y, x in grids:
            axes = torch.meshgrid(*(torch.arange(n, dtype=torch.int16) for n in (t, y, x)), indexing="ij")
            image = torch.full((t * y * x, 1), number, dtype=torch.int16)
            part = torch.cat([image, torch.stack(axes, -1).view(-1, 3)], 1)
            left = torch.nonzero(mine.flatten() & (places[..., 0].flatten() < 0)).flatten()[: len(part)]
            places.view(-1, 4)[left] = part.to(ids.device)
            number += 1
    return places


def _grids(family: Family, config: Any, count: int, told: Tensor | None) -> list[tuple[int, int, int]] | None:
    """Grids of all images of one kind, in order, that make up `count` tokens; None where none do."""
    if not count:
        return []
    if family.grid == "square":
        size = next((getattr(config, name) for name in SQUARES if hasattr(config, name)), 1)
        side = isqrt(size)
        known = size > 1 and side**2 == size and count % size == 0
        return [(1, side, side)] * (count // size) if known else None
    if told is None:
        return None
    merge = config.vision_config.spatial_merge_size
    grids = [(int(t), int(y) // merge, int(x) // merge) for t, y, x in told.tolist()]
    return grids if sum(t * y * x for t, y, x in grids) == count else None
