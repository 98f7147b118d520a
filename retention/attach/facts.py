"""What a forward knows of its tokens, and the guards both attachments share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from retention.models.family import Family, decoder_of
from retention.models.patches import GRIDS, patch_places

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_attached: "WeakSet[nn.Module]" = WeakSet()


class TokenFacts:
    """Padding and modality of the newest forward's tokens, caught at the door of the model."""

    def __init__(self, family: Family, config: Any) -> None:
        self.family, self.config = family, config
        self.visual: Bool[Tensor, "batch tokens"] | None = None
        self.caught: tuple[Tensor | None, dict[str, Any]] = None, {}

    def catch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model: only there the token ids are visible."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.visual = None if ids is None else self.family.visual_mask(self.config, ids)
        self.caught = ids, {name: kwargs[name] for name in GRIDS if name in kwargs}

    def take(self, batch: int, tokens: int, device: torch.device) -> Bool[Tensor, "batch tokens"]:
        """The visual mask of this forward; all False where only embeddings were given."""
        visual, self.visual = self.visual, None
        if visual is None or visual.shape != (batch, tokens):
            return torch.zeros(batch, tokens, dtype=torch.bool, device=device)
        return visual.to(device)

    def places(self, batch: int, tokens: int, device: torch.device) -> Int[Tensor, "batch tokens 4"] | None:
        """Image, frame, row and column of the patches of this forward; None where they are not known."""
        ids, given = self.caught
        if ids is None or ids.shape != (batch, tokens):
            return None
        found = patch_places(self.family, self.config, ids, given)
        return None if found is None else found.to(device)


def valid_tokens(mask: Tensor | None, batch: int, tokens: int, device: torch.device) -> Bool[Tensor, "batch tokens"]:
    """Which of the newest `tokens` are no padding, from a 2-D attention mask over everything so far.

    Raises:
        ValueError: for a mask of another rank, which does not tell padding apart.
    """
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if mask.dim() != 2:
        raise ValueError(
            f"expected a 2-D attention mask [batch, tokens], got {mask.dim()} dimensions; pass the padding mask"
        )
    return mask[:, -tokens:].to(device).bool()


def token_positions(valid: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Sequence index of each token, padding excluded (padding repeats its neighbour's)."""
    return (valid.long().cumsum(1) - 1).clamp(min=0)


@contextmanager
def attached(model: "PreTrainedModel", implementation: str) -> Iterator[None]:
    """Run the decoder through a registered attention function, and restore it afterwards.

    Raises:
        ValueError: when the model is attached already.
    """
    if model in _attached:
        raise ValueError("this model is attached already: leave the other attach_gates or evicting block first")
    decoder = decoder_of(model)
    before = decoder.config._attn_implementation
    _attached.add(model)
    try:
        _set_attention(model, implementation)
        yield
    finally:
        _set_attention(model, before)
        _attached.discard(model)


def _set_attention(model: "PreTrainedModel", name: str) -> None:
    composite = model.config.get_text_config() is not model.config
    model.set_attn_implementation({"text_config": name} if composite else name)


def register_attention(name: str, function: Any) -> None:
    """Make an attention function known to transformers, with the mask SDPA gets; idempotent, never at import."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
