"""Which rows form which batch of a mixture: stretch by stretch of every epoch, from any place on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from retention.data.batches import Limits, Slot, planned
from retention.data.chat import Chat, read_chat
from retention.data.media import BadRow
from retention.data.mixture import Mixture
from retention.data.source import Rows, Stream


@dataclass
class Source:
    """An opened source and how its rows are read."""

    name: str
    rows: Rows | Stream
    columns: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    weight: float | None = None

    @property
    def length(self) -> int | None:
        """Number of rows; None where it is a stream."""
        return len(self.rows) if not isinstance(self.rows, Stream) else None

    def told(self, number: int) -> int:
        """The number of a row in the whole data set, where these rows are a part of it."""
        return int(getattr(self.rows, "numbers", {number: number})[number])

    def chat(self, number: int, raw: Mapping[str, Any] | BadRow | None = None) -> Chat:
        """A row as a chat, `raw` where it was read already.

        Raises:
            BadRow: where it is none.
        """
        if raw is None:
            raw = self.rows[number]  # type: ignore[index]
        if isinstance(raw, BadRow):
            raise raw
        return read_chat(raw, f"{self.name}:{self.told(number)}", columns=self.columns, folder=self.folder)


@dataclass(frozen=True)
class Place:
    """Where a planned batch stands: epoch, stretch of the epoch, number among this process's batches of it."""

    epoch: int = 0
    stretch: int = 0
    number: int = 0


class Plan:
    """Which rows form which batch, stretch by stretch of every epoch; the same for every process."""

    def __init__(
        self, sources: Sequence[Source], limits: Limits, *, seed: int, bucket: int, image_tokens: int, ranks: int = 1
    ) -> None:
        """Rows of like length are put together among `bucket` batches; an image is guessed to take `image_tokens`."""
        self.sources, self.limits, self.seed, self.image_tokens, self.ranks = sources, limits, seed, image_tokens, ranks
        self.mixture = Mixture([s.length for s in sources], [s.weight for s in sources], seed)
        self.stretch = limits.rows * ranks * bucket
        self.stretches = -(-self.mixture.size // self.stretch)
        self._streams: dict[int, tuple[int, Iterator[Any]]] = {}
        self.batches = lru_cache(maxsize=1)(self._batches)

    def after(self, place: Place, rank: int) -> Iterator[tuple[Place, list[Slot]]]:
        """One process's batches from a place on, epoch after epoch."""
        epoch, stretch, number = place.epoch, place.stretch, place.number
        while True:
            mine = self.batches(epoch, stretch)[rank :: self.ranks]
            yield from ((Place(epoch, stretch, i), mine[i]) for i in range(number, len(mine)))
            stretch, number = stretch + 1, 0
            if stretch == self.stretches:
                epoch, stretch = epoch + 1, 0

    def _batches(self, epoch: int, stretch: int) -> list[list[Slot]]:
        """All batches of a stretch, those of process r being every `ranks`-th from r on."""
        drawn = self.mixture.order(epoch)[stretch * self.stretch :][: self.stretch].tolist()
        slots = [self._slot(source, draw) for source, draw in drawn]
        generator = np.random.default_rng([self.seed, epoch, stretch, 2])
        return planned(slots, self.limits, self.ranks, generator)

    def _slot(self, source: int, draw: int) -> Slot:
        """A row with its guessed length; bad ones are found again, and counted, when they are encoded."""
        origin, number = self.sources[source], self.mixture.row(source, draw)
        raw = self._next(source, draw) if origin.length is None else None
        try:
            chat = origin.chat(number, raw)
        except BadRow:
            return Slot(source, number, raw=raw)
        images = len(chat.media)
        return Slot(source, number, chat.characters // 4 + images * self.image_tokens, images, raw)

    def _next(self, source: int, draw: int) -> Any:
        """A stream's row: the next one while it is read in order."""
        place, rows = self._streams.get(source, (-1, iter(())))
        if place != draw:
            stream: Any = self.sources[source].rows
            rows = stream.after(draw)
        row = next(rows)
        self._streams[source] = draw + 1, rows
        return row
