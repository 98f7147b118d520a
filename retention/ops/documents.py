"""Rows of a padded batch as documents of one row without padding, and back."""

from dataclasses import dataclass

from jaxtyping import Bool, Int, Shaped
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the tokens of a padded batch lie in one row."""

    valid: Bool[Tensor, "batch tokens"]
    places: Int[Tensor, " row"]
    """Of every token of the one row: its place in the padded batch, counted row by row."""
    lengths: tuple[int, ...]
    """Tokens of each document."""

    @classmethod
    def of(cls, valid: Bool[Tensor, "batch tokens"]) -> "Documents":
        """The documents that are the rows of a padded batch."""
        return cls(valid, valid.flatten().nonzero()[:, 0], tuple(valid.sum(1).tolist()))

    def packed(self, padded: Shaped[Tensor, "..."], axis: int = 0) -> Shaped[Tensor, "..."]:
        """A tensor [..., batch, tokens, ...], the batch at `axis`, as [..., 1, row, ...]; padding is left out."""
        return padded.flatten(axis, axis + 1).index_select(axis, self.places).unsqueeze(axis)

    def padded(self, packed: Shaped[Tensor, "1 row *rest"]) -> Shaped[Tensor, "batch tokens *rest"]:
        """The other way round; padding is 0."""
        wide = packed.new_zeros(self.valid.numel(), *packed.shape[2:]).index_copy(0, self.places, packed[0])
        return wide.unflatten(0, self.valid.shape)

    def rows(self, packed: Shaped[Tensor, "1 heads row width"]) -> Shaped[Tensor, "batch heads tokens width"]:
        """Queries, keys or values of an attention call, told per row again."""
        return self.padded(packed.transpose(1, 2)).transpose(1, 2)

    def positions(self) -> Int[Tensor, "1 row"]:
        """Positions that begin at 0 in every document."""
        return self.packed(self.valid.long().cumsum(1) - 1)
