"""Supported architectures, keyed by transformers' `model_type`."""

from typing import TYPE_CHECKING

from retention.models.family import Family, Rope, rope_of
from retention.models.generic import generic_family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES: dict[str, Family] = {
    "gemma2": Family(),
    "gemma3": Family(grid="square", own_mask=True),
    "gemma3_text": Family(),
    "idefics3": Family(),
    "internvl": Family(grid="square"),
    "llama": Family(),
    "llava": Family(grid="square"),
    "llava_next": Family(),
    "llava_onevision": Family(),
    "mistral": Family(),
    "mistral3": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen2_5_vl": Family(rope="mrope", grid="thw"),
    "qwen2_vl": Family(rope="mrope", grid="thw"),
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "qwen3_next": Family(),
    "qwen3_vl": Family(rope="mrope_interleaved", grid="thw"),
    "qwen3_vl_moe": Family(rope="mrope_interleaved", grid="thw"),
    "smolvlm": Family(),
}


def family_of(model: "PreTrainedModel") -> Family:
    """The model's family; an architecture that is not listed is looked at, and taken where it behaves as those do.

    Raises:
        ValueError: for an architecture that does not follow the standard attention interface, with the reason.
    """
    return FAMILIES.get(model.config.model_type) or generic_family(model)


__all__ = ["FAMILIES", "Family", "Rope", "family_of", "rope_of"]
