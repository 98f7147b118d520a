"""What differs between architectures, and what is read off any frozen model."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

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


VISUAL_TOKENS = ("image_token_id", "video_token_id")
"""Attributes of a config that hold the ids of visual placeholder tokens, whatever the architecture."""


@dataclass(frozen=True)
class Family:
    """What of an architecture (`model_type`) can be read neither off its config nor off its decoder."""

    rope: str = "1d"
    """Which axis turns each frequency: "1d", or of M-RoPE's time, height and width "mrope" (one chunk each) or
    "mrope_interleaved", keys in the half-split layout; "unknown" keeps positions as they are."""
    grid: str = "unknown"
    """How visual tokens lie in their image: "square" (as many as the config says, row by row), "thw" (the inputs tell
    frames, rows and columns) or "unknown"."""
    own_mask: bool = False
    """Whether attention is more than causal (tokens of an image see all of it), so that the model's mask is read."""

    def visual_ids(self, config: Any) -> list[int]:
        """Ids of the visual placeholder tokens."""
        named = (getattr(config, name, None) for name in VISUAL_TOKENS)
        return [number for number in named if number is not None]

    def visual_mask(self, config: Any, input_ids: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """True at visual tokens."""
        return torch.isin(
            input_ids, torch.tensor(self.visual_ids(config), device=input_ids.device, dtype=input_ids.dtype)
        )


@dataclass(frozen=True, eq=False)
class Rope:
    """How the decoder's rotary embedding turns the keys of full-attention layers, read off the live module.

    A deep copy shares the module, so copying a cache that holds a `Rope` never copies the model.
    """

    rotary: Any
    buffer: str
    """Name of the module's inverse frequencies."""
    axis: Int[Tensor, " frequencies"]
    """Which coordinate turns each frequency."""
    axes: int
    """Coordinates per token: 1, or 3 (time, height, width)."""
    changes: bool
    """Whether forwards change the frequencies ("dynamic", "longrope"): keys differ in those they were written with."""

    def frequencies(self) -> Float[Tensor, " frequencies"]:
        """Inverse frequencies in force now (those of the last forward), fp32; a copy, for longrope writes in place."""
        return getattr(self.rotary, self.buffer).detach().float().clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rope":
        return self


def rope_of(model: "PreTrainedModel", family: Family) -> Rope:
    """The rotary embedding that full-attention layers of a model use.

    Raises:
        ValueError: for a decoder without known inverse frequencies, or with an unknown assignment of axes.
    """
    rotary: Any = getattr(decoder_of(model), "rotary_emb", None)
    names = ("inv_freq", "full_attention_inv_freq")  # Gemma 3 has frequencies for each type of layer
    buffer = next((name for name in names if hasattr(rotary, name)), None)
    if buffer is None:
        raise ValueError(
            f"positions 'packed' needs a decoder with rotary_emb.inv_freq, {model.config.model_type} has none; "
            "use positions=original"
        )
    kind = rotary.rope_type["full_attention"] if isinstance(rotary.rope_type, dict) else rotary.rope_type
    told = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    section = getattr(rotary, "mrope_section", None) or told.get(
        "mrope_section"
    )  # older modules leave it to the config
    axis = _axis(family.rope, getattr(rotary, buffer), section)
    return Rope(rotary, buffer, axis, 1 if family.rope == "1d" else 3, "dynamic" in kind or kind == "longrope")


def _axis(rope: str, inv_freq: Tensor, section: Sequence[int] | None) -> Int[Tensor, " frequencies"]:
    """Axis of each frequency, as `recomposition_frequencies` of Qwen2.5-VL and Qwen3-VL chooses them."""
    axis = torch.zeros(inv_freq.shape, dtype=torch.long, device=inv_freq.device)
    match rope, section:
        case "1d", None:
            pass
        case "unknown", _:
            raise ValueError("how this model rotates its keys is not known; use positions=original")
        case "mrope", [*chunks] if sum(chunks) == len(axis):
            axis[:] = torch.arange(len(chunks)).remainder(3).repeat_interleave(torch.tensor(chunks))
        case "mrope_interleaved", [_, height, width]:
            axis[1 : 3 * height : 3] = 1
            axis[2 : 3 * width : 3] = 2
        case _:
            raise ValueError(
                f"expected mrope_section {section} of the config to divide {len(axis)} frequencies as {rope!r} does; "
                "mend the config, or use positions=original"
            )
    return axis


def decoder_of(model: "PreTrainedModel") -> Any:
    """The language decoder (a module with `layers`, `config`, `rotary_emb`) of a text or vision-language model."""
    return model.get_decoder()


def head_of(model: "PreTrainedModel") -> Callable[[Tensor], Tensor]:
    """From final hidden states to logits, as the model's own forward does it, scaled or capped ones included."""
    config, embeddings = model.config.get_text_config(), model.get_output_embeddings()
    cap = getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1)
    if cap is None and factor == 1:
        return embeddings

    def head(hidden: Tensor) -> Tensor:
        logits = embeddings(hidden) * factor
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return head


def layer_kinds(config: Any) -> list[str]:
    """What each layer of a config's decoder is, told as `transformers.DynamicCache` tells it.

    A config without `layer_types` has one type throughout: full_attention or sliding_attention.
    """
    text = config.get_text_config()
    local = any(getattr(text, name, None) is not None for name in ("sliding_window", "attention_chunk_size"))
    one = "sliding_attention" if local else "full_attention"
    return list(getattr(text, "layer_types", None) or [one] * text.num_hidden_layers)


def evictable_layers(model: "PreTrainedModel") -> tuple[int, ...]:
    """Indices of full-attention layers; sliding and linear layers keep transformers' own cache."""
    return config_shape(model.config).layers


def model_shape(model: "PreTrainedModel") -> ModelShape:
    """Sizes of the frozen decoder."""
    return config_shape(model.config)


def config_shape(config: Any) -> ModelShape:
    """Sizes of the decoder that a config, of a text or vision-language model, describes."""
    text = config.get_text_config()
    return ModelShape(
        model_type=config.model_type,
        layers=tuple(i for i, kind in enumerate(layer_kinds(config)) if kind == "full_attention"),
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        hidden_size=text.hidden_size,
    )


def decoder_device(model: "PreTrainedModel") -> torch.device:
    """Where the decoder computes, also with weights that are kept elsewhere until they are needed.

    Raises:
        ValueError: for a decoder spread over several devices.
    """
    found: set[torch.device] = set()
    for layer in decoder_of(model).layers:
        placed = [getattr(getattr(m, "_hf_hook", None), "execution_device", None) for m in layer.modules()]
        known = [torch.device(device) for device in placed if device is not None]
        found |= set(known) or {next(layer.parameters()).device}
    if len(found) > 1:
        raise ValueError(
            f"expected a decoder on one device, got {', '.join(sorted(map(str, found)))}: gates and evicting caches do not "
            "work across devices; load it on one, quantised (model.quantization) or with parts offloaded to cpu or disk"
        )
    return found.pop()


def _norms(decoder: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights of all normalisations by name, those that accelerate keeps elsewhere included."""
    for path, module in decoder.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            whole = f"{path}.{name}" if path else name
            if "norm" in whole and parameter.dim() == 1:
                elsewhere: Any = getattr(module, "_hf_hook", None)
                yield whole, elsewhere.weights_map[name] if parameter.is_meta else parameter


def fingerprint(model: "PreTrainedModel") -> dict[str, str]:
    """Name, config hash and weight hash of a base; gates refuse another one.

    The weight hash covers every normalisation weight of the decoder in bfloat16, so it is the same in float32 and
    bfloat16, whole or quantised, and differs between fine-tunes that touch them. A base stored in float32 and loaded
    in float16 rounds otherwise.
    """
    config = {k: v for k, v in model.config.get_text_config().to_dict().items() if k not in _VOLATILE}
    weights = hashlib.sha256()
    for _, parameter in sorted(_norms(decoder_of(model))):
        weights.update(parameter.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return {
        "config_hash": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "weight_hash": weights.hexdigest()[:16],
    }
