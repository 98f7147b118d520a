"""What gates and policies do to one batch: survival by layer and head, life of every patch, allocation."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, UInt8

from retention.attach.hard import evicting
from retention.cache.evicting import EvictingCache
from retention.data.example import EvidenceRef
from retention.data.render import Rendered
from retention.gates import RetentionGates
from retention.ops.decay import half_life
from retention.policies import POLICIES
from retention.tasks.answering import prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Patches = tuple[
    UInt8[np.ndarray, "images height width 3"],
    Float[np.ndarray, "images rows columns"],
    Bool[np.ndarray, "images rows columns"],
]

LONGEST_LIFE = 1e6


def survival(cache: EvictingCache) -> Float[np.ndarray, "layers kv_heads"]:
    """Kept share of the context by layer and head, over all rows."""
    return (cache.kept().sum(1) / cache.seen().sum()).double().cpu().numpy()


def patch_lives(cache: EvictingCache, batch: Rendered, row: int = 0) -> Patches | None:
    """Images of one context, the longest half-life of each patch over layers and heads, and the asked evidence.

    None where gates staged nothing or the images' tokens do not form a square grid.
    """
    example = batch.examples[row]
    gates = [layer.state().log_beta for layer in cache.evicting_layers]
    images, grid = example.images[:16], example.meta.get("grid")
    visual = batch.visual[row]
    if any(x is None for x in gates) or not images or grid is None:
        return None
    per_image = int(visual.sum()) // len(example.images)
    side = round(per_image**0.5)
    if side * side * len(example.images) != int(visual.sum()):
        return None
    lives = np.stack([half_life(x[row][:, visual].clamp(max=-1e-9)).cpu().numpy() for x in gates if x is not None])
    life = lives.max((0, 1)).clip(max=LONGEST_LIFE).reshape(-1, side, side)[: len(images)]
    evidence = np.zeros((len(images), grid, grid), bool)
    for turn in example.turns:
        for ref in turn.evidence:
            if isinstance(ref, EvidenceRef) and ref.image < len(images):
                evidence[ref.image, ref.row, ref.column] = True
    return np.stack(images), life, evidence


def look_at_patches(model: "PreTrainedModel", batch: Rendered, gates: RetentionGates) -> Patches | None:
    """`patch_lives` of the first context of a batch, from a prefill that only the gates watch."""
    with evicting(model, POLICIES["full"](), gates=gates, extra_collectors=("gate",)) as cache:
        prefill(model, cache, batch)
    return patch_lives(cache, batch)
