"""An architecture nobody listed: two forwards of one token tell whether it can be worked with, and how its keys rotate."""

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from retention.models.family import VISUAL_TOKENS, Family, decoder_of, evictable_layers, model_shape, rope_of
from retention.ops.rope import angles, turn_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
NAME = "retention_look"
FAR = 5
"""Position of the second token that is looked at."""
KNOWN = ("scaling", "dropout", "position_ids", "sliding_window", "softcap")
"""Numbers and tensors that an attention function may be given."""
_found: "WeakKeyDictionary[PreTrainedModel, Family]" = WeakKeyDictionary()


@dataclass
class Look:
    """What the attention of each layer was given for one token."""

    keys: dict[int, Float[Tensor, "1 kv_heads 1 head_dim"]] = field(default_factory=dict)
    odd: set[str] = field(default_factory=set)
    """Numbers and tensors beyond the standard ones."""


def generic_family(model: "PreTrainedModel") -> Family:
    """How to treat a model of an architecture that is not listed; noted once in the log.

    Raises:
        ValueError: where it cannot be worked with, with the reason.
    """
    if model in _found:
        return _found[model]
    decoder = decoder_of(model)
    missing = [name for name in ("layers", "config", "rotary_emb") if not hasattr(decoder, name)]
    if missing:
        _refuse(model, f"its decoder {type(decoder).__name__} has no {missing[0]}")
    layers = evictable_layers(model)
    if any(not hasattr(getattr(decoder.layers[i], "self_attn", None), "layer_idx") for i in layers):
        _refuse(model, "its layers have no self_attn with a layer_idx")
    near, far = _looked_at(model, 0), _looked_at(model, FAR)
    shape = model_shape(model)
    for layer in layers:
        if layer not in near.keys:
            _refuse(model, f"attention of layer {layer} does not call transformers' attention function")
        got = tuple(near.keys[layer].shape)
        if got != (1, shape.num_kv_heads, 1, shape.head_dim):
            _refuse(model, f"attention of layer {layer} gets keys of shape {got}, which its config does not tell")
    if near.odd:
        _refuse(model, f"its attention takes {', '.join(sorted(near.odd))}, which eviction does not know")
    visual = any(getattr(model.config, name, None) is not None for name in VISUAL_TOKENS)
    family = Family(rope="1d" if _rotates(model, layers, near, far) else "unknown", own_mask=visual)
    log.warning(
        "%s is no listed family: it is treated as a standard decoder (%s, %s); scripts/smoke_hf.py checks it",
        model.config.model_type,
        "visual tokens by its config" if visual else "text only",
        "half-split rotary keys" if family.rope == "1d" else "original positions only",
    )
    _found[model] = family
    return family


def _refuse(model: "PreTrainedModel", reason: str) -> NoReturn:
    from retention.models import FAMILIES

    raise ValueError(
        f"expected a model of a supported family ({', '.join(sorted(FAMILIES))}) or one that follows transformers' "
        f"attention interface, got model_type {model.config.model_type!r}: {reason}"
    )


@torch.no_grad()
def _looked_at(model: "PreTrainedModel", position: int) -> Look:
    """One token through the decoder alone, at a position."""
    from transformers import AttentionInterface

    look, decoder = Look(), decoder_of(model)

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        look.keys[module.layer_idx] = key.detach().float()
        numbers = (name for name, given in kwargs.items() if isinstance(given, Tensor | float | int))
        look.odd |= {name for name in numbers if name not in KNOWN and not isinstance(kwargs[name], bool)}
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attention)
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = NAME
    device = next(decoder.parameters()).device
    try:
        token = torch.full((1, 1), decoder.config.vocab_size // 2, device=device)  # not padding, whose embedding is 0
        decoder(input_ids=token, position_ids=torch.full_like(token, position), use_cache=False)
    except Exception as error:
        _refuse(model, f"one token through its decoder fails ({str(error).splitlines()[0]})")
    finally:
        decoder.config._attn_implementation = before
    return look


def _rotates(model: "PreTrainedModel", layers: tuple[int, ...], near: Look, far: Look) -> bool:
    """Whether keys at two positions differ by the rotation that packed positions would undo."""
    try:
        rope = rope_of(model, Family())
    except ValueError:
        return False
    for layer in layers:
        first, second = near.keys[layer], far.keys[layer]
        places = torch.full((1, *first.shape[:3]), FAR, device=first.device)
        turned = turn_keys(first, angles(places, rope.frequencies(), rope.axis))
        if not bool(first.any()) or not torch.allclose(turned, second, atol=1e-2 * float(second.abs().max())):
            return False
    return True
