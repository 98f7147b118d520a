"""Supported architectures, keyed by transformers' `model_type`."""

from typing import TYPE_CHECKING

from retention.models.family import Family, Rope, rope_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES: dict[str, Family] = {
    "gemma3_text": Family(),
    "llama": Family(),
    "llava": Family(visual_token_attributes=("image_token_id",), grid="square"),
    "mistral": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen2_5_vl": Family(visual_token_attributes=("image_token_id", "video_token_id"), rope="mrope", grid="thw"),
    "qwen3": Family(),
    "qwen3_next": Family(),
    "qwen3_vl": Family(
        visual_token_attributes=("image_token_id", "video_token_id"), rope="mrope_interleaved", grid="thw"
    ),
}


def family_of(model: "PreTrainedModel") -> Family:
    """The model's family.

    Raises:
        ValueError: for an architecture that is not supported, naming those that are.
    """
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise ValueError(
            f"expected a model of a supported family ({', '.join(sorted(FAMILIES))}), got model_type {model_type!r}; "
            "CONTRIBUTING.md says how to add a family"
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Family", "Rope", "family_of", "rope_of"]
