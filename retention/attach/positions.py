"""Position ids of what an evicting cache is fed next: a token's place in its sequence, whatever was evicted."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from retention.cache.evicting import EvictingCache
from retention.models import family_of
from retention.models.patches import GRIDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOLD = (*GRIDS, "mm_token_type_ids", "second_per_grid_ts")


def position_ids(
    model: "PreTrainedModel",
    cache: EvictingCache,
    ids: Int[Tensor, "batch tokens"],
    mask: Int[Tensor, "batch tokens"],
    inputs: Mapping[str, Tensor],
) -> Shaped[Tensor, "*axes batch tokens"]:
    """Positions of the next tokens, padding excluded; of three axes where the model has them.

    Images may come at any time: those of a later prompt lie behind what the cache has seen, which the models
    themselves provide for the first prompt only. `inputs` are what the processor gave beside ids and mask.

    Raises:
        ValueError: for images whose tokens the processor did not mark.
    """
    started = cache.columns > 0
    before = cache.seen() if started else mask.new_zeros(len(mask))
    places = (before[:, None] + mask.cumsum(1) - 1).clamp(min=0)
    if not family_of(model).rope.startswith("mrope"):
        return places
    if not any(name in inputs for name in GRIDS):
        deltas = 0 if cache.rope_deltas is None else cache.rope_deltas.to(places.device)
        return (places + deltas).expand(3, -1, -1)
    if "mm_token_type_ids" not in inputs:
        raise ValueError(
            "expected mm_token_type_ids beside the images, got none; call the processor with return_mm_token_type_ids=True"
        )
    inner: Any = model.model
    own, _ = inner.get_rope_index(ids, attention_mask=mask, **{k: inputs[k] for k in _TOLD if k in inputs})
    first = cache.tokens.inputs.next if started else None
    own = own if first is None else own + first.to(own.device)[:, None]
    real = torch.where(mask.bool(), own, -1)
    cache.rope_deltas = (real.amax((0, 2)) + 1 - before - mask.sum(1))[:, None]
    return own
