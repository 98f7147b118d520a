"""Training batches in an order that depends on seed and step only, so that a resumed run sees the same ones."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from retention.data.loader import MixtureLoader
from retention.data.render import Rendered, Renderer
from retention.tasks import Task
from retention.training.config import DataConfig
from retention.training.own_data import OwnData
from retention.types import Batch


class BatchDataset(Dataset[Batch]):
    """Batch i of a task: drawn and rendered when asked for."""

    def __init__(
        self,
        task: Task,
        renderer: Renderer,
        config: DataConfig,
        style: str,
        steps: int,
        ranks: int = 1,
        rank: int = 0,
    ) -> None:
        self.task, self.renderer, self.config, self.style, self.steps = task, renderer, config, style, steps
        self.ranks, self.rank = ranks, rank

    def __len__(self) -> int:
        """Batches in the run."""
        return self.steps

    def __getitem__(self, index: int) -> Batch:
        """Contexts `index * batch_size` onwards of the training split; several processes deal them out in turn."""
        first = (index * self.ranks + self.rank) * self.config.batch_size
        return self.renderer.training_batch(
            [
                self.task.example(self.config.seed, "train", first + i, style=self.style, n_turns=self.config.n_turns)
                for i in range(self.config.batch_size)
            ]
        )


class ResumableLoader:
    """Iterates batches in order and remembers, in checkpoints, how many contexts were used."""

    def __init__(self, dataset: BatchDataset, num_workers: int) -> None:
        self.dataset, self.num_workers, self.done = dataset, num_workers, 0

    def __len__(self) -> int:
        """Batches in the run."""
        return len(self.dataset)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from where the run stands."""
        rest = range(self.done, len(self.dataset))
        for batch in DataLoader(self.dataset, batch_size=None, sampler=rest, num_workers=self.num_workers):
            self.done += 1
            yield batch

    @property
    def _contexts(self) -> int:
        """Contexts of a batch, over all processes."""
        return self.dataset.ranks * self.dataset.config.batch_size

    def state_dict(self) -> dict[str, int]:
        """Contexts used so far by all processes, however many there were."""
        return {"contexts": self.done * self._contexts}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after the contexts used."""
        self.done = state["contexts"] // self._contexts


class Groups:
    """A loader's batches by steps: a list of those that one optimisation step takes."""

    def __init__(self, loader: ResumableLoader | MixtureLoader, accumulate: int) -> None:
        self.loader, self.accumulate = loader, accumulate

    def __len__(self) -> int:
        """Steps in the run."""
        return len(self.loader) // self.accumulate

    def __iter__(self) -> Iterator[list[Batch]]:
        """Steps from where the run stands."""
        batches = iter(self.loader)
        while group := list(islice(batches, self.accumulate)):
            yield group

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, between two steps."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.loader.load_state_dict(state)


class GateData(L.LightningDataModule):
    """Training batches of a task or of own data, and the fixed validation contexts for hard eviction."""

    def __init__(
        self, task: Task, renderer: Renderer, config: DataConfig, style: str, steps: int, accumulate: int = 1
    ) -> None:
        super().__init__()
        self.task, self.renderer, self.config, self.style, self.steps = task, renderer, config, style, steps
        self.accumulate = accumulate
        self.own = OwnData(config, renderer) if config.sources else None
        self.loader: MixtureLoader | None = None

    @property
    def bad_rows(self) -> dict[str, int]:
        """Rows of own data that were left out so far, by reason."""
        return {} if self.loader is None else dict(self.loader.bad)

    def record(self, bad_rows: Mapping[str, int]) -> dict[str, Any]:
        """What the artefact says of own data: its sources, and how many rows were left out and why."""
        if self.own is None:
            return {}
        sources = [asdict(source) for source in self.config.sources]
        return {"data": {"sources": sources, "loss_on": self.config.loss_on, "bad_rows": dict(bad_rows)}}

    def train_dataloader(self) -> Groups:
        """One pass over exactly the run's steps."""
        return Groups(self.batches(), self.accumulate)

    def batches(self) -> ResumableLoader | MixtureLoader:
        """The batches of this process, as many for each step as are accumulated."""
        trainer, batches = self.trainer, self.steps * self.accumulate
        ranks, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
        if self.own is not None:
            self.loader = self.own.loader(batches, ranks, rank)
            return self.loader
        dataset = BatchDataset(self.task, self.renderer, self.config, self.style, batches, ranks, rank)
        return ResumableLoader(dataset, self.config.num_workers)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches of a step wait where they are and go to the device one at a time."""
        return batch

    def validation_contexts(self) -> Rendered:
        """Contexts of the task's validation split, with its own number of turns; or held-out rows of own data."""
        if self.own is not None and self.config.held_out:
            return self.renderer.render(self.own.questions())
        return self.renderer.render(
            [self.task.example(self.config.seed, "val", i, style=self.style) for i in range(self.config.val_examples)]
        )
