"""Batches of mixed sources without end, from any place on: read, encoded by workers, bad rows counted and left out."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from retention.data.batches import Limits, Slot, runs
from retention.data.encode import Encoder
from retention.data.media import BadRow
from retention.data.plan import Place, Plan, Source
from retention.types import Batch

_BARREN = 64
"""Bad rows on end, at least, after which a run stops; in a larger data set it is all of an epoch."""
log = logging.getLogger(__name__)


@dataclass
class Made:
    """What became of a planned batch: one or, where its rows were longer than guessed, several; and its bad rows."""

    place: Place
    batches: list[Batch]
    bad: list[tuple[str, int, BadRow]]
    rows: int


class Maker(Dataset[Made]):
    """Encodes planned batches, in the training process or in workers."""

    def __init__(self, sources: Sequence[Source], encoder: Encoder, limits: Limits) -> None:
        self.sources, self.encoder, self.limits = sources, encoder, limits

    def __getitem__(self, task: tuple[Place, list[Slot]]) -> Made:
        """The batches of these rows; budgets hold for what the rows really take."""
        place, slots = task
        rows, bad = [], []
        for slot in slots:
            source = self.sources[slot.source]
            try:
                rows.append(self.encoder.row(source.chat(slot.number, slot.raw)))
            except BadRow as error:
                bad.append((source.name, source.told(slot.number), error))
        cuts = runs([(row.tokens, row.images) for row in rows], self.limits)
        return Made(place, [self.encoder.batch(rows[cut]) for cut in cuts], bad, len(slots))


class MixtureLoader:
    """One process's batches; remembers in checkpoints how far it is and which rows were bad."""

    def __init__(self, plan: Plan, maker: Maker, *, steps: int, num_workers: int, refuse: bool, rank: int = 0) -> None:
        self.plan, self.maker, self.steps, self.num_workers, self.refuse = plan, maker, steps, num_workers, refuse
        self.rank, self.place, self.part, self.done = rank, Place(), 0, 0
        self.bad: Counter[str] = Counter()
        """Bad rows by reason, of the batches used so far."""

    def __len__(self) -> int:
        """Batches in the run."""
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        """Batches from where the run stands.

        Raises:
            ValueError: at a bad row where they are refused, or when not one row of an epoch can be used.
        """
        if self.done >= self.steps:
            return
        barren = 0
        loader = DataLoader(self.maker, batch_size=None, sampler=_Tasks(self), num_workers=self.num_workers)
        for made in loader:
            skipped = self.part if made.place == self.place else 0
            if not skipped:
                self._report(made.bad)
            barren = 0 if made.batches else barren + made.rows
            if barren >= max(_BARREN, self.plan.mixture.size // self.plan.ranks):
                told = ", ".join(f"{reason} ({count} rows)" for reason, count in self.bad.most_common())
                raise ValueError(f"expected rows to train on, got only bad ones: {told}; check data.sources")
            for part, batch in enumerate(made.batches):
                if part < skipped:
                    continue
                self.place, self.part, self.done = made.place, part + 1, self.done + 1
                yield batch
                if self.done >= self.steps:
                    return

    def _report(self, bad: Sequence[tuple[str, int, BadRow]]) -> None:
        """Count bad rows and log them, ever more rarely; or refuse the first."""
        for source, number, error in bad:
            if self.refuse:
                raise ValueError(f"row {number} of {source} cannot be used: {error}; mend it, or set data.on_bad=skip")
            self.bad[error.reason] += 1
            count = self.bad[error.reason]
            if count <= 3 or count in (10, 100, 1000, 10_000, 100_000):
                log.warning("left out row %d of %s: %s (%d with this reason)", number, source, error, count)

    def state_dict(self) -> dict[str, Any]:
        """Of every process, since one writes for all: the place after the last batch used, bad rows up to there."""
        place = asdict(self.place) | {"part": self.part, "done": self.done, "bad": dict(self.bad)}
        if self.plan.ranks == 1 or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"ranks": {self.rank: place}}
        every: list[Any] = [None] * self.plan.ranks
        torch.distributed.all_gather_object(every, place)
        return {"ranks": dict(enumerate(every))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batches used.

        Raises:
            ValueError: where the state is that of fewer processes.
        """
        if self.rank not in state["ranks"]:
            raise ValueError(
                f"expected a run to go on with as many processes as before, got {self.plan.ranks} after "
                f"{len(state['ranks'])}; set trainer.devices and num_nodes as they were"
            )
        own = state["ranks"][self.rank]
        self.place = Place(own["epoch"], own["stretch"], own["number"])
        self.part, self.done, self.bad = own["part"], own["done"], Counter(own["bad"])


class _Tasks:
    """What the loader's workers are given next."""

    def __init__(self, loader: MixtureLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[Place, list[Slot]]]:
        return self.loader.plan.after(self.loader.place, self.loader.rank)
