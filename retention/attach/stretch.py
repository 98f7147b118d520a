"""A model whose tokens lie further apart than they are: rotary positions times a factor, the content as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from retention.models.family import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def stretched(model: "PreTrainedModel", factor: float) -> Iterator[None]:
    """Inside, every rotary angle is that of `factor` times its position: above 1 tokens lie further apart, below closer.

    An angle is a position times a frequency, so it is the frequencies that are multiplied, whatever axes positions
    have; who reads them (packed positions, expected attention) reads what the model uses. A number added to all
    positions would change nothing: a query meets a key by the difference of their positions.

    Raises:
        ValueError: for a factor of 0 or less, for a decoder without rotary frequencies, and for one whose forwards
            change them (dynamic, longrope), where no factor would stay what it is.
    """
    if factor <= 0:
        raise ValueError(f"expected positions stretched by a factor above 0, got {factor}")
    held = {} if factor == 1 else {buffer: buffer.clone() for buffer in _frequencies(model)}
    with torch.no_grad():
        for buffer in held:
            buffer.mul_(factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in held.items():
                buffer.copy_(before)


def _frequencies(model: "PreTrainedModel") -> list[Any]:
    """The decoder's buffers of inverse frequencies, each once."""
    rotary: Any = getattr(decoder_of(model), "rotary_emb", None)
    found = [] if rotary is None else [x for name, x in rotary.named_buffers() if name.endswith("inv_freq")]
    kind = getattr(rotary, "rope_type", "default")
    kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
    changing = sorted(kind for kind in kinds if "dynamic" in kind or kind == "longrope")
    if not found or changing:
        got = f"frequencies that its forwards change ({', '.join(changing)})" if changing else "none"
        raise ValueError(
            f"expected a decoder with rotary frequencies to stretch positions by, got {got} in {model.config.model_type}; "
            "leave the positions of this model as they are"
        )
    return found
