"""What differs between architectures, and what is read off any frozen model."""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.types import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VOLATILE = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "_attn_implementation_autoset",
)


@dataclass(frozen=True)
class Family:
    """One transformers architecture (`model_type`): which tokens are visual, how positions rotate."""

    visual_token_attributes: tuple[str, ...] = ()
    """Config attributes that hold the ids of visual placeholder tokens."""
    rope: str = "1d"
    """Kind of rotary position; only one-dimensional ones can be packed."""

    def visual_ids(self, config: Any) -> list[int]:
        """Ids of the visual placeholder tokens."""
        return [getattr(config, name) for name in self.visual_token_attributes]

    def visual_mask(self, config: Any, input_ids: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """True at visual tokens."""
        return torch.isin(
            input_ids, torch.tensor(self.visual_ids(config), device=input_ids.device, dtype=input_ids.dtype)
        )


def decoder_of(model: "PreTrainedModel") -> Any:
    """The language decoder (a module with `layers`, `config`, `rotary_emb`) of a text or vision-language model."""
    return model.get_decoder()


def evictable_layers(model: "PreTrainedModel") -> tuple[int, ...]:
    """Indices of full-attention layers; sliding and linear layers keep transformers' own cache."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return tuple(i for i, kind in enumerate(types) if kind == "full_attention")


def model_shape(model: "PreTrainedModel") -> ModelShape:
    """Sizes of the frozen decoder."""
    config = model.config.get_text_config()
    return ModelShape(
        model_type=model.config.model_type,
        layers=evictable_layers(model),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        hidden_size=config.hidden_size,
    )


def fingerprint(model: "PreTrainedModel") -> dict[str, str]:
    """Name, config hash and weight hash of a base; gates refuse another one.

    The weight hash covers every normalisation weight of the decoder in bfloat16, so it is the same in every
    dtype the base is loaded in and differs between fine-tunes that touch them.
    """
    config = {k: v for k, v in model.config.get_text_config().to_dict().items() if k not in _VOLATILE}
    weights = hashlib.sha256()
    for name, parameter in sorted(decoder_of(model).named_parameters()):
        if "norm" in name and parameter.dim() == 1:
            weights.update(parameter.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return {
        "config_hash": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "weight_hash": weights.hexdigest()[:16],
    }


def rope_frequencies(model: "PreTrainedModel", family: Family) -> Float[Tensor, " frequencies"]:
    """Inverse frequencies of the decoder's rotary embedding.

    Raises:
        ValueError: for a family whose positions are not one-dimensional.
    """
    if family.rope != "1d":
        raise ValueError(
            f"positions 'packed' needs one-dimensional rotary positions, {model.config.model_type} has {family.rope}; "
            "use positions=original"
        )
    return decoder_of(model).rotary_emb.inv_freq
