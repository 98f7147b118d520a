"""What is known of every token a cache was fed, one column each: padding, modality, protection."""

import copy

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F


class Tokens:
    """Columns in the order they came, the same for all layers and heads; never forgotten, three bytes a token."""

    def __init__(self) -> None:
        self.valid = torch.zeros(0, 0, dtype=torch.bool)
        """False for padding."""
        self.visual = torch.zeros(0, 0, dtype=torch.bool)
        self.wanted = torch.zeros(0, 0, dtype=torch.bool)
        """Tokens a user asked to keep."""
        self.prompted = torch.zeros(0, dtype=torch.bool)
        """Columns that came with a prompt."""
        self.pending: Bool[Tensor, "batch tokens"] | None = None
        """A user's mask of tokens that are still to come."""

        self.evidence: Bool[Tensor, "batch positions"] | None = None
        """Sequence positions that answer the questions, padding excluded, where they were named."""

    def __len__(self) -> int:
        return self.valid.shape[1]

    def add(self, valid: Bool[Tensor, "batch tokens"], visual: Bool[Tensor, "batch tokens"], *, prompt: bool) -> None:
        """The columns of a forward.

        Raises:
            ValueError: when the forward, or the mask to protect, has another number of rows.
        """
        self.check_rows(valid.shape[0])
        if not len(self):
            self.valid, self.visual, self.wanted = valid[:, :0], visual[:, :0], visual[:, :0]
            self.prompted = self.prompted.to(valid.device)
        wanted = self._next_wanted(valid)  # refuses a mask that does not fit, before anything changes
        self.valid = torch.cat([self.valid, valid], 1)
        self.visual = torch.cat([self.visual, visual & valid], 1)
        self.wanted = torch.cat([self.wanted, wanted], 1)
        self.prompted = torch.cat([self.prompted, self.prompted.new_full((valid.shape[1],), prompt)])

    def check_rows(self, rows: int) -> None:
        """A forward has as many rows as the ones before.

        Raises:
            ValueError: when it has not.
        """
        if len(self) and rows != len(self.valid):
            raise ValueError(f"the cache holds a batch of {len(self.valid)}, the forward has {rows} rows")

    def protect(self, mask: Bool[Tensor, "batch tokens"]) -> None:
        """Mark tokens to keep among the next ones.

        Raises:
            ValueError: for anything but a boolean mask [batch, tokens].
        """
        if mask.dim() != 2 or mask.dtype != torch.bool:
            raise ValueError(
                f"expected a boolean mask [batch, tokens], got {mask.dtype} with {mask.dim()} dimensions; "
                "mark the tokens to protect with True"
            )
        self.pending = mask

    def _next_wanted(self, valid: Bool[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        wanted = torch.zeros_like(valid)
        if self.pending is not None:
            mask, new = self.pending.to(valid.device), valid.shape[1]
            if mask.shape[0] != valid.shape[0]:
                raise ValueError(
                    f"expected a mask of {valid.shape[0]} rows, as the forward has, got {mask.shape[0]}; "
                    "protect one row per sequence"
                )
            wanted[:, : mask.shape[1]] = mask[:, :new]
            self.pending = mask[:, new:] if mask.shape[1] > new else None
        return wanted & valid

    def positions(self) -> Int[Tensor, "batch columns"]:
        """Sequence index of every column, padding excluded."""
        return self.valid.long().cumsum(1) - 1

    def seen(self) -> Int[Tensor, " batch"]:
        """Tokens processed per row, padding excluded."""
        return self.valid.sum(1)

    def marks(
        self, positions: Int[Tensor, "batch kv_heads keys"], *, text: bool
    ) -> tuple[Bool[Tensor, "batch kv_heads keys"], Bool[Tensor, "batch kv_heads keys"]]:
        """Which entries, by sequence index, are visual, and which are protected; `text` protects prompts' text."""
        protected = self.wanted | (self.prompted & ~self.visual & self.valid) if text else self.wanted
        target = torch.where(self.valid, self.positions(), len(self))
        empty = torch.zeros(self.valid.shape[0], len(self) + 1, dtype=torch.bool, device=self.valid.device)
        index = positions.clamp(min=0).flatten(1)
        visual, kept = (
            empty.scatter(1, target, x).gather(1, index).view(positions.shape) for x in (self.visual, protected)
        )
        return visual, kept

    def answering(self, positions: Int[Tensor, "batch kv_heads keys"]) -> Bool[Tensor, "batch kv_heads keys"] | None:
        """Which entries, by sequence index, are evidence; None where none was named."""
        if self.evidence is None:
            return None
        table = F.pad(self.evidence, (0, 1))  # positions behind the mask are no evidence
        return table.gather(1, positions.clamp(0, table.shape[1] - 1).flatten(1)).view(positions.shape)

    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep the given batch rows, in that order."""
        self.valid, self.visual, self.wanted = self.valid[rows], self.visual[rows], self.wanted[rows]
        self.pending = None if self.pending is None else self.pending.to(rows.device)[rows]
        self.evidence = None if self.evidence is None else self.evidence[rows]

    def fork(self) -> "Tokens":
        """An independent continuation."""
        return copy.copy(self)

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        optional = [x for x in (self.pending, self.evidence) if x is not None]
        return [self.valid, self.visual, self.wanted, self.prompted, *optional]
