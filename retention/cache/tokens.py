"""What is known of every token a cache was fed, one column each: padding, modality, protection."""

import copy

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from retention.cache.inputs import Inputs


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
        self.inputs = Inputs()
        self.left: Int[Tensor, "layers batch kv_heads"] | None = None
        """Entries that the last prompt left, where a rule for decoding asks."""
        self.left_of: Int[Tensor, " batch"] | None = None
        """Tokens seen then."""

        self.places: Int[Tensor, "batch tokens 4"] | None = None
        """Image, frame, row and column of patches, image -1 elsewhere, where a memory asks."""
        self.coming: Int[Tensor, "batch tokens 4"] | None = None
        """Those of tokens that are still to come."""

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
        if prompt:
            self.left, self.left_of = None, None
        self._add_places(valid)
        self.valid = torch.cat([self.valid, valid], 1)
        self.visual = torch.cat([self.visual, visual & valid], 1)
        self.wanted = torch.cat([self.wanted, wanted], 1)
        self.prompted = torch.cat([self.prompted, self.prompted.new_full((valid.shape[1],), prompt)])

    def announce(self, places: Int[Tensor, "batch tokens 4"] | None) -> None:
        """Told before a forward where its patches lie; their images are numbered on from those before."""
        if places is not None and self.places is not None and self.places.numel():
            number = places[..., :1] + self.places[..., 0].max() + 1
            places = torch.cat([torch.where(places[..., :1] < 0, -1, number), places[..., 1:]], -1)
        self.coming = places

    def _add_places(self, valid: Bool[Tensor, "batch tokens"]) -> None:
        if self.coming is None and self.places is None:
            return
        before = (
            self.places
            if self.places is not None
            else valid.new_full((len(valid), len(self), 4), -1, dtype=torch.int16)
        )
        count = valid.shape[1]
        blank = before.new_full((len(valid), count, 4), -1)
        new = blank if self.coming is None else self.coming[:, :count]
        self.coming = None if self.coming is None else self.coming[:, count:]
        self.places = torch.cat([before, torch.where(valid[..., None], new, blank)], 1)

    def patches(self, positions: Int[Tensor, "batch kv_heads keys"]) -> Int[Tensor, "batch kv_heads keys 4"] | None:
        """Where entries, by sequence index, lie in their images; None where nobody asked."""
        if self.places is None:
            return None
        target = torch.where(self.valid, self.positions(), len(self))[..., None].expand(self.places.shape)
        table = F.pad(self.places, (0, 0, 0, 1), value=-1).scatter(1, target, self.places)
        index = positions.clamp(min=0).flatten(1)[..., None].expand(-1, -1, 4)
        return table.gather(1, index).view(*positions.shape, 4)

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
        index = positions.clamp(min=0).flatten(1)
        visual, kept = (x.gather(1, index).view(positions.shape) for x in self._by_position(self.visual, protected))
        return visual, kept

    def _by_position(self, *columns: Bool[Tensor, "batch columns"]) -> list[Bool[Tensor, "batch columns_and_one"]]:
        """Marks of columns by sequence index; the last place takes padding."""
        target = torch.where(self.valid, self.positions(), len(self))
        empty = torch.zeros(self.valid.shape[0], len(self) + 1, dtype=torch.bool, device=self.valid.device)
        return [empty.scatter(1, target, x) for x in columns]

    def note_left(self, kept: Int[Tensor, "layers batch kv_heads"]) -> None:
        """Told before a decoded token: what is held, unless that is known since the last prompt."""
        if self.left is None and len(self):
            self.left, self.left_of = kept, self.seen()

    def allowance(self, layer: int) -> Int[Tensor, "batch kv_heads"] | None:
        """What the last prompt left in each head, times what was seen by now, over what was seen then; rounded down."""
        if self.left is None or self.left_of is None:
            return None
        return self.left[layer] * self.seen()[:, None] // self.left_of.clamp(min=1)[:, None]

    def suffix(self, positions: Int[Tensor, "batch kv_heads keys"]) -> Bool[Tensor, "batch kv_heads keys"]:
        """Which entries, by sequence index, are text of prompts with no visual token behind."""
        behind = self.prompted & self.valid & (self.visual.flip(1).cumsum(1).flip(1) == 0)
        (table,) = self._by_position(behind)
        return table.gather(1, positions.clamp(min=0).flatten(1)).view(positions.shape)

    def looked(self) -> Bool[Tensor, "batch positions"]:
        """Which sequence positions are visual, padding excluded."""
        return self._by_position(self.visual)[0][:, :-1]

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
        self.places = None if self.places is None else self.places[rows]
        self.coming = None if self.coming is None else self.coming[rows]
        self.inputs.select_rows(rows)
        if self.left is not None and self.left_of is not None:
            self.left, self.left_of = self.left[:, rows], self.left_of[rows]

    def fork(self) -> "Tokens":
        """An independent continuation."""
        twin = copy.copy(self)
        twin.inputs = self.inputs.fork()
        return twin

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        optional = [x for x in (self.pending, self.evidence, self.left, self.left_of, self.places) if x is not None]
        return [self.valid, self.visual, self.wanted, self.prompted, *optional]
