"""Physical storage of one layer: ragged kept entries per head, and a dense buffer of what came since.

Kept entries of all rows and heads lie without padding: the full pages of every head one after the other, and
what is left of each head in one loose strip. Heads of equal length need no pages. When the first token after an
eviction arrives, the loose entries move to the front of the buffer, right-aligned. Kept parts are never changed
in place and buffers copy before writing what a fork shares, so a copy of a storage is an independent fork.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from retention.cache.buffer import Buffer
from retention.ops.ragged import PAGE as PAGE
from retention.ops.ragged import ragged_arange


@dataclass
class Entries:
    """What is known of each kept entry beside its key and value, ordered by row, head, position."""

    positions: Int[Tensor, " kept"]
    log_beta: Float[Tensor, "kept ..."] | None
    coordinates: Int[Tensor, "axes kept"] | None
    """Where each key is rotated to, where positions are packed."""


def take(tables: Sequence[Shaped[Tensor, "_ width"]], index: Int[Tensor, " n"]) -> Shaped[Tensor, "n width"]:
    """Rows of several tables read as one after the other."""
    ends = torch.tensor([len(table) for table in tables]).cumsum(0).tolist()
    spans = [(table, end - len(table), end) for table, end in zip(tables, ends, strict=True) if len(table)]
    if not spans or not len(index):
        return tables[0].new_empty(len(index), tables[0].shape[1])
    table, start, end = max(spans, key=lambda span: span[2] - span[1])
    out = table.index_select(0, (index - start).clamp(0, end - start - 1) if len(spans) > 1 else index - start)
    for other, start, end in spans:
        if other is not table:
            at = torch.nonzero((index >= start) & (index < end)).flatten()
            out.index_copy_(0, at, other.index_select(0, index[at] - start))
    return out


def _picked(
    tables: list[Tensor], rows: Tensor, which: Tensor, turn: Callable[[Tensor, Tensor], Tensor] | None
) -> Tensor:
    """Some of the kept entries, re-rotated where asked for."""
    found = take(tables, rows[which])
    return found if turn is None else turn(found, which)


class LayerStorage:
    """Keys, values, positions and gate outputs of one layer."""

    def __init__(self) -> None:
        self.counts: Int[Tensor, "batch kv_heads"] | None = None
        """Kept entries by head; None before the first eviction."""
        self.longest = 0
        self.uniform = True
        self.entries: Entries | None = None
        self.page_counts: Int[Tensor, "batch kv_heads"] | None = None
        self.owner: Int[Tensor, " pages"] | None = None
        """Segment (row x KV heads + head) of each page."""
        self.longest_pages = 0
        """Most pages of a head."""
        self.pages: list[Tensor] = []
        """Keys and values, [pages, PAGE, width]; empty where no head fills a page or all are equal."""
        self.loose: list[Tensor] = []
        """Keys and values of the other kept entries, [entries, width]; empty once they moved to the buffers."""
        self.buffers: list[Buffer] = []
        """Keys and values: `front` columns of kept entries, then the tail."""
        self.front = 0
        self.log_beta: Buffer | None = None
        """Gate outputs of the tail: `log_beta`, or with one axis more what it is made of at any budget."""

    @property
    def tail(self) -> int:
        """Tokens appended since the last eviction."""
        return self.buffers[0].used - self.front if self.buffers else 0

    def append(
        self,
        keys: Float[Tensor, "batch kv_heads tokens head_dim"],
        values: Float[Tensor, "batch kv_heads tokens value_dim"],
        log_beta: Float[Tensor, "batch kv_heads tokens ..."] | None,
        spare: int = 0,
    ) -> bool:
        """Add new tokens to the tail of every head; True if memory was allocated. `spare`: room for later ones."""
        moved = False
        if not self.buffers:
            self.buffers, moved = [Buffer(keys), Buffer(values)], True
        else:
            self._open(keys.shape[2] + spare)
            for buffer, new in zip(self.buffers, (keys, values), strict=True):
                moved = buffer.append(new, spare) or moved
        if log_beta is not None and self.log_beta is None:
            self.log_beta = Buffer(log_beta)
        elif log_beta is not None and self.log_beta is not None:
            moved = self.log_beta.append(log_beta, spare) or moved
        return moved

    def _open(self, room: int) -> None:
        """Move loose entries to the front of buffers with room for more."""
        if not self.loose:
            return
        at, cells = self._front_cells(self.loose_counts(), room)
        for place, strip in enumerate(self.loose):
            self._start_buffer(place, strip.new_zeros(cells, strip.shape[1]).index_copy_(0, at, strip), room)
        self.loose = []

    def _front_cells(self, lengths: Int[Tensor, "batch kv_heads"], room: int) -> tuple[Int[Tensor, " loose"], int]:
        """Where loose entries lie in a buffer with `room` behind them, right-aligned, and its number of cells."""
        self.front = int(lengths.max())
        width, flat = self.front + room, lengths.flatten()
        ends = torch.arange(1, len(flat) + 1, device=flat.device) * width - room
        return ragged_arange(ends - flat, flat), len(flat) * width

    def _start_buffer(self, place: int, cells: Float[Tensor, "cells width"], room: int) -> None:
        assert self.counts is not None
        data = cells.view(*self.counts.shape, self.front + room, cells.shape[1])
        self.buffers[place] = Buffer(data, self.front)
        self.buffers[place].shared = False

    def loose_counts(self) -> Int[Tensor, "batch kv_heads"]:
        """Kept entries of each head outside full pages."""
        assert self.counts is not None
        return self.counts if self.page_counts is None else self.counts - PAGE * self.page_counts

    def holes(self) -> Int[Tensor, "batch kv_heads"] | None:
        """Empty columns at the front of each head's buffer; None where there are none."""
        if self.uniform or not self.front:
            return None
        return self.front - self.loose_counts()

    def kept_valid(self) -> Bool[Tensor, "batch kv_heads kept"]:
        """False in the holes of heads shorter than the longest, when laid out padded."""
        assert self.counts is not None
        return torch.arange(self.longest, device=self.counts.device) < self.counts[..., None]

    def padded(self, flat: Shaped[Tensor, "kept ..."]) -> Shaped[Tensor, "batch kv_heads longest ..."]:
        """A per-entry tensor with heads padded to the longest; holes hold their neighbours'."""
        assert self.counts is not None
        if self.uniform:
            return flat.view(*self.counts.shape, self.longest, *flat.shape[1:])
        start = rearrange(self.counts.flatten().cumsum(0), "(b h) -> b h", h=self.counts.shape[1]) - self.counts
        slots = start[..., None] + torch.arange(self.longest, device=start.device)
        return flat[slots.clamp(max=max(len(flat) - 1, 0))]

    def gate_outputs(self) -> Float[Tensor, "batch kv_heads keys ..."] | None:
        """Of the entries as `view` lays them out; None where no gate looked."""
        if self.log_beta is None:
            return None
        tail, known = self.log_beta.view(), None if self.entries is None else self.entries.log_beta
        return torch.cat([self.padded(known), tail], 2) if self.longest and known is not None else tail

    @property
    def gate_bytes(self) -> int:
        """Bytes of one entry's gate output."""
        return 0 if self.log_beta is None else 4 * self.log_beta.data[:1, :1, :1].shape[3:].numel()

    def view(self) -> tuple[Tensor, Tensor]:
        """Keys and values with heads padded to the longest: kept entries first, then the tail."""
        if self.counts is None or (self.uniform and not self.loose):
            keys, values = (buffer.view() for buffer in self.buffers)
        elif self.uniform:
            keys, values = (self.padded(strip) for strip in self.loose)
        else:
            shape = (*self.counts.shape, self.longest + self.tail)
            axes = [torch.arange(size, device=self.counts.device) for size in shape]
            cells = [x.flatten() for x in torch.meshgrid(*axes, indexing="ij")]
            keys, values = (take(*self._locate(i, *cells, clamp=True)).view(*shape, -1) for i in (0, 1))
        return keys, values

    def _locate(
        self, place: int, row: Tensor, head: Tensor, column: Tensor, *, clamp: bool = False
    ) -> tuple[list[Tensor], Int[Tensor, " n"]]:
        """Tables of keys (place 0) or values (1), and where in them the given columns of the padded view lie."""
        table, (by_row, by_head, by_column) = self.buffers[place].rows()
        tables = [table]
        index = row * by_row + head * by_head + (self.front + column - self.longest) * by_column
        if self.counts is None:
            return tables, index
        counts, segment = self.counts.flatten(), row * self.counts.shape[1] + head
        if clamp:
            last = (counts - 1).clamp(min=0)[segment]
            column = torch.where(column < self.longest, torch.minimum(column, last), column)
        kept, paged = column < self.longest, torch.zeros_like(counts)
        if self.page_counts is not None:
            paged = PAGE * self.page_counts.flatten()
            tables.append(self.pages[place].flatten(0, 1))
            inside = len(table) + (paged.cumsum(0) - paged)[segment] + column
            index = torch.where(kept & (column < paged[segment]), inside, index)
        strip, loose = column - paged[segment], counts - paged
        if self.loose:
            offset = sum(map(len, tables))
            tables.append(self.loose[place])
            outside = offset + (loose.cumsum(0) - loose)[segment] + strip
        else:
            hole = (self.front - loose)[segment]
            outside = row * by_row + head * by_head + (hole + strip) * by_column
        index = torch.where(kept & (strip >= 0), outside, index)
        return tables, index.clamp(0, max(sum(map(len, tables)) - 1, 0)) if clamp else index

    def keep(
        self,
        mask: Bool[Tensor, "batch kv_heads keys"],
        entries: Entries,
        turn: Callable[[Tensor, Tensor], Tensor] | None = None,
        spare: int = 0,
        contents: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Keep exactly the masked entries of the padded view; everything else is freed.

        `entries` describes the kept ones in order. `turn(keys, which)` re-rotates keys, `which` being their
        numbers in that order. `spare`: room for tokens to come, where it costs a copy to make it later. `contents`
        are keys and values of the kept entries, in that order, where they are others than those held.
        """
        index = torch.nonzero(mask, as_tuple=True)
        sources = [self._locate(place, *index) for place in range(len(self.buffers))]
        if contents is not None:
            sources = [([x], torch.arange(len(x), device=x.device)) for x in contents]
        counts = mask.sum(-1)
        self.longest = int(counts.max())
        self.uniform = bool((counts == self.longest).all())
        paged = torch.zeros_like(counts) if self.uniform else counts // PAGE
        any_page = bool(paged.any())
        self.counts, self.entries = counts, entries
        self.page_counts, self.owner = (paged, torch.repeat_interleave(paged.flatten())) if any_page else (None, None)
        self.longest_pages = int(paged.max())
        self.pages, self.loose, self.front = [], [], 0
        starts = counts.flatten().cumsum(0) - counts.flatten()
        whole, left = PAGE * paged.flatten(), self.loose_counts()
        in_pages, others = ragged_arange(starts, whole), ragged_arange(starts + whole, left.flatten())
        buffers = self.buffers
        self.buffers = [Buffer.empty(buffer.data, *counts.shape) for buffer in buffers]
        at, cells = self._front_cells(left, spare) if spare and not any_page else (None, 0)
        for place, (tables, rows) in enumerate(sources):
            turned = turn if place == 0 else None
            if any_page:
                pages = _picked(tables, rows, in_pages, turned)
                self.pages.append(pages.view(-1, PAGE, pages.shape[1]))
            if at is None:
                self.loose.append(_picked(tables, rows, others, turned))
            else:
                everywhere = torch.zeros(cells, dtype=torch.long, device=mask.device)
                data = take(tables, everywhere.index_copy_(0, at, rows))
                if turned is not None:
                    data.index_copy_(0, at, turned(data[at], others))
                self._start_buffer(place, data, spare)
        if self.log_beta is not None:
            self.log_beta = Buffer(self.log_beta.data[:, :, :0].clone())

    def fork(self) -> "LayerStorage":
        """An independent continuation that shares what neither changes."""
        twin = copy.copy(self)
        twin.pages, twin.loose = list(self.pages), list(self.loose)
        twin.buffers = [buffer.fork() for buffer in self.buffers]
        twin.log_beta = None if self.log_beta is None else self.log_beta.fork()
        return twin

    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep the given batch rows, in that order, repeats allowed (beam search)."""
        if self.counts is not None and self.entries is not None:
            old = self.counts
            segments = (rows[:, None] * old.shape[1] + torch.arange(old.shape[1], device=rows.device)).flatten()

            def pick(lengths: Tensor) -> Tensor:
                return ragged_arange((lengths.cumsum(0) - lengths)[segments], lengths[segments])

            chosen = pick(old.flatten())
            known = self.entries
            self.entries = Entries(
                known.positions[chosen],
                None if known.log_beta is None else known.log_beta[chosen],
                None if known.coordinates is None else known.coordinates[:, chosen],
            )
            if self.loose:
                strip = pick(self.loose_counts().flatten())
                self.loose = [x.index_select(0, strip) for x in self.loose]
            if self.page_counts is not None:
                whole = pick(self.page_counts.flatten())
                self.pages = [x.index_select(0, whole) for x in self.pages]
                self.page_counts = self.page_counts[rows]
                self.owner = torch.repeat_interleave(self.page_counts.flatten())
            self.counts = old[rows]
        self.buffers = [buffer.select_rows(rows) for buffer in self.buffers]
        self.log_beta = None if self.log_beta is None else self.log_beta.select_rows(rows)

    def tensors(self) -> Mapping[str, list[Tensor]]:
        """Every tensor this layer holds, by ledger item."""
        known = self.entries
        groups: dict[str, list[Tensor | None]] = {
            "scores": [
                None if known is None else known.log_beta,
                None if self.log_beta is None else self.log_beta.data,
            ],
            "positions": [None if known is None else known.positions, None if known is None else known.coordinates],
            "layout": [self.counts, self.page_counts, self.owner],
        }
        for place, item in enumerate(("keys", "values")):
            held = [*self.pages[place : place + 1], *self.loose[place : place + 1]]
            groups[item] = [*held, *(buffer.data for buffer in self.buffers[place : place + 1])]
        return {item: [x for x in group if x is not None] for item, group in groups.items()}
