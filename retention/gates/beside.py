"""What a gate may know of a token beside the attention's input: its modality, the text before it, the budget."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from retention.ops.decay import log_beta_from_score
from retention.ops.relevance import text_relevance

MODALITIES = ("none", "embedding")


class Grounding(nn.Module):
    """One layer's vectors for modality and nearness to text, added to what the gate reads; they start at 0.

    A reconstruction. The relevance is a cosine, so its vector is worth at most itself.
    """

    def __init__(self, hidden: int, *, modality: bool, text_prior: bool) -> None:
        super().__init__()
        self.modality = nn.Parameter(torch.zeros(2, hidden)) if modality else None
        """Of text, of vision."""
        self.prior = nn.Parameter(torch.zeros(hidden)) if text_prior else None

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens hidden"],
        visual: Bool[Tensor, "batch tokens"],
        valid: Bool[Tensor, "batch tokens"],
        heard: Float[Tensor, "batch hidden"] | None,
    ) -> tuple[Float[Tensor, "batch tokens hidden"], Float[Tensor, "batch hidden"] | None]:
        """What the gate reads, and the text heard so far where the gate listens to it."""
        read = hidden if self.modality is None else hidden + self.modality[visual.long()]
        if self.prior is None:
            return read, None
        relevance, heard = text_relevance(hidden, valid & ~visual, heard)
        return read + relevance.to(read.dtype)[..., None] * self.prior, heard


@dataclass
class Reading:
    """What a gate says of some tokens, at any budget."""

    score: Float[Tensor, "batch kv_heads tokens"]
    """Pre-activation; of gates that read the budget, at the reference budget."""
    slope: Float[Tensor, "batch kv_heads tokens"] | None = None
    """How the score grows with the budget's coordinate; None where the gate does not read it."""
    heard: Float[Tensor, "batch hidden"] | None = None
    """Sum of the layer's text so far, where the gate listens to it."""

    def at(self, coordinate: Float[Tensor, " batch"] | None) -> Float[Tensor, "batch kv_heads tokens"]:
        """The score at a budget, given as the coordinate of each row's; None is the reference."""
        if self.slope is None or coordinate is None:
            return self.score
        return self.score + self.slope * coordinate[:, None, None]

    def stored(self) -> Float[Tensor, "batch kv_heads tokens ..."]:
        """What a cache keeps: `log_beta`, or score and slope, of which `log_beta` follows at any budget."""
        if self.slope is None:
            return log_beta_from_score(self.score)
        return torch.stack([self.score, self.slope], -1)
