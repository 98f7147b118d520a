"""Physical storage of one layer: ragged kept entries per head, and a dense tail of what came since.

Kept entries of all rows and heads lie in one flat tensor without padding; the tail holds the tokens appended
since the last eviction, the same for every head. Nothing is changed in place, so a copy that shares tensors
is an independent fork.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class PaddedView:
    """Entries of one layer, heads padded to the longest: kept entries first, then the tail."""

    keys: Float[Tensor, "batch kv_heads keys head_dim"]
    values: Float[Tensor, "batch kv_heads keys value_dim"]
    kept: int
    """Length of the padded kept part."""


def _own(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a view into a larger one that it would keep alive (fused projections)."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size() else tensor


class LayerStorage:
    """Keys, values, positions and gate outputs of one layer."""

    def __init__(self) -> None:
        self.counts: Int[Tensor, "batch kv_heads"] | None = None
        self.longest = 0
        self.uniform = True
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.positions: Tensor | None = None
        self.log_beta: Tensor | None = None
        self.tail_keys: Tensor | None = None
        self.tail_values: Tensor | None = None
        self.tail_log_beta: Tensor | None = None

    @property
    def tail(self) -> int:
        """Tokens appended since the last eviction."""
        return 0 if self.tail_keys is None else self.tail_keys.shape[2]

    def append(
        self,
        keys: Float[Tensor, "batch kv_heads tokens head_dim"],
        values: Float[Tensor, "batch kv_heads tokens value_dim"],
        log_beta: Float[Tensor, "batch kv_heads tokens"] | None,
    ) -> None:
        """Add new tokens to the tail of every head."""
        self.tail_keys = _own(keys) if self.tail_keys is None else torch.cat([self.tail_keys, keys], 2)
        self.tail_values = _own(values) if self.tail_values is None else torch.cat([self.tail_values, values], 2)
        if log_beta is not None:
            self.tail_log_beta = (
                log_beta if self.tail_log_beta is None else torch.cat([self.tail_log_beta, log_beta], 2)
            )

    def slots(self) -> Int[Tensor, "batch kv_heads kept"]:
        """Flat index of each kept entry, padded with the head's neighbours (masked out by `kept_valid`)."""
        assert self.counts is not None
        assert self.keys is not None
        start = rearrange(self.counts.flatten().cumsum(0), "(b h) -> b h", h=self.counts.shape[1]) - self.counts
        steps = torch.arange(self.longest, device=start.device)
        return (start[..., None] + steps).clamp(max=max(self.keys.shape[0] - 1, 0))

    def kept_valid(self) -> Bool[Tensor, "batch kv_heads kept"]:
        """False in the holes of heads shorter than the longest."""
        assert self.counts is not None
        return torch.arange(self.longest, device=self.counts.device) < self.counts[..., None]

    def padded(self, flat: Tensor) -> Tensor:
        """A flat per-entry tensor as [batch, kv_heads, kept, ...]; a view without copy where heads are equal."""
        assert self.counts is not None
        if self.uniform:
            return flat.view(*self.counts.shape, self.longest, *flat.shape[1:])
        return flat[self.slots()]

    def view(self) -> PaddedView:
        """What attention reads."""
        assert self.tail_keys is not None
        assert self.tail_values is not None
        if self.counts is None or self.keys is None or self.values is None or self.longest == 0:
            return PaddedView(self.tail_keys, self.tail_values, 0)
        keys = torch.cat([self.padded(self.keys), self.tail_keys], 2)
        return PaddedView(keys, torch.cat([self.padded(self.values), self.tail_values], 2), self.longest)

    def keep(
        self,
        mask: Bool[Tensor, "batch kv_heads keys"],
        view: PaddedView,
        positions: Int[Tensor, "batch kv_heads keys"],
        log_beta: Float[Tensor, "batch kv_heads keys"] | None,
    ) -> None:
        """Keep exactly the masked entries of the view; everything else is freed."""
        self.counts = mask.sum(-1)
        self.longest = int(self.counts.max())
        self.uniform = bool((self.counts == self.longest).all())
        self.keys, self.values = view.keys[mask], view.values[mask]
        self.positions = positions[mask].int()
        self.log_beta = None if log_beta is None else log_beta[mask]
        empty = (mask.shape[0], mask.shape[1], 0)
        self.tail_keys = view.keys.new_empty(*empty, view.keys.shape[-1])
        self.tail_values = view.values.new_empty(*empty, view.values.shape[-1])
        self.tail_log_beta = None if log_beta is None else log_beta.new_empty(empty)

    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep the given batch rows, in that order, repeats allowed (beam search)."""
        if self.counts is not None and self.keys is not None:
            slots, valid = self.slots()[rows], self.kept_valid()[rows]
            chosen = slots[valid]
            self.keys, self.values, self.positions, self.log_beta = (
                None if x is None else x[chosen] for x in (self.keys, self.values, self.positions, self.log_beta)
            )
            self.counts = self.counts[rows]
        self.tail_keys, self.tail_values, self.tail_log_beta = (
            None if x is None else x[rows] for x in (self.tail_keys, self.tail_values, self.tail_log_beta)
        )

    def tensors(self) -> Mapping[str, list[Tensor]]:
        """Every tensor this layer holds, by ledger item."""
        groups = {
            "keys": [self.keys, self.tail_keys],
            "values": [self.values, self.tail_values],
            "scores": [self.log_beta, self.tail_log_beta],
            "positions": [self.positions],
            "layout": [self.counts],
        }
        return {item: [x for x in group if x is not None] for item, group in groups.items()}
