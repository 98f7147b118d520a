"""What a forward knows of its tokens: padding, modality, places."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from retention.models.family import Family
from retention.models.patches import GRIDS, patch_places
from retention.ops.documents import Documents


@dataclass(frozen=True)
class Facts:
    """The tokens of one forward of the decoder."""

    valid: Bool[Tensor, "batch tokens"]
    visual: Bool[Tensor, "batch tokens"]
    """All False where only embeddings were given."""
    padded: bool
    """Whether any of them is padding."""
    find_places: Callable[[], Int[Tensor, "batch tokens 4"] | None]
    documents: Documents | None = None
    """Where the decoder gets the rows as documents of one; everything here is told per row all the same."""

    @property
    def positions(self) -> Int[Tensor, "batch tokens"]:
        """Sequence index of each token, if they are the first."""
        return token_positions(self.valid)

    def places(self) -> Int[Tensor, "batch tokens 4"] | None:
        """Image, frame, row and column of the patches; None where they are not known."""
        return self.find_places()


@dataclass(frozen=True)
class Caught:
    """Arguments of a forward of the whole model that its decoder does not get."""

    ids: Int[Tensor, "batch tokens"] | None = None
    mask: Tensor | None = None
    given: dict[str, Any] | None = None
    documents: Documents | None = None
    """Where the decoder will get the rows as documents of one."""


class TokenFacts:
    """Catches facts at the door of the model: only there the token ids, and always the padding mask, are visible."""

    def __init__(self, family: Family, config: Any) -> None:
        self.family, self.config = family, config
        self.caught = Caught()

    def catch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = {name: kwargs[name] for name in GRIDS if name in kwargs}
        self.caught = Caught(ids, kwargs.get("attention_mask"), given)

    def of(self, kwargs: dict[str, Any]) -> Facts:
        """Facts of the tokens that the decoder gets with these arguments; what was caught serves once."""
        batch, tokens, device = shape_of(kwargs)
        caught, self.caught = self.caught, Caught()
        mask, ids = kwargs.get("attention_mask"), caught.ids
        if caught.documents is not None:
            mask, (batch, tokens) = caught.documents.valid, caught.documents.valid.shape
        elif not isinstance(mask, Tensor) or mask.dim() != 2:
            # built already, by a model that sees more than its decoder
            mask = caught.mask if mask is not None else None
        valid = valid_tokens(mask, batch, tokens, device)
        if ids is None or ids.shape != (batch, tokens):
            ids = None
        visual = torch.zeros_like(valid) if ids is None else self.family.visual_mask(self.config, ids).to(device)

        def places() -> Int[Tensor, "batch tokens 4"] | None:
            found = None if ids is None else patch_places(self.family, self.config, ids, caught.given or {})
            return None if found is None else found.to(device)

        return Facts(valid, visual, mask is not None and not bool(valid.all()), places, caught.documents)


def shape_of(arguments: dict[str, Any]) -> tuple[int, int, torch.device]:
    """Rows, tokens and device of what a decoder gets."""
    embedded = arguments.get("inputs_embeds")
    inputs: Tensor = arguments["input_ids"] if embedded is None else embedded
    return inputs.shape[0], inputs.shape[1], inputs.device


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
