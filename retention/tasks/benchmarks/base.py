"""Published data sets as tasks: rows of a hub id, a mirror or a local copy, checked and put into the form of an example."""

import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8

from retention.data.example import Example, Limit, Segment
from retention.data.hub import folder_of, open_source
from retention.data.media import BadRow, film, located, opened
from retention.data.source import Rows, SourceConfig
from retention.tasks.base import Task
from retention.tasks.benchmarks.schema import check_row
from retention.types import require

log = logging.getLogger(__name__)
Row = Mapping[str, Any]
FILES = (".parquet", ".jsonl", ".json")


@dataclass
class DatasetTask(Task):
    """Rows of one data set in their order, or in one drawn by the seed; subclasses say what a row asks."""

    chance: ClassVar[float] = 0.0
    schema: ClassVar[Mapping[str, str]]
    """Columns that are read, with what they hold: see `schema.KINDS`."""
    cut: ClassVar[str] = "middle"
    """Where prompts over `max_tokens` are shortened."""
    kept: ClassVar[int] = 0
    """First segments that stay, where the cut is at the start."""

    path: str = ""
    """A hub id, or a local file or folder in the same schema."""
    subset: str | None = None
    """Configuration of a hub data set."""
    data_split: str = "test"
    """Split of the data set that is evaluated."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    folder: str | None = None
    """Where relative paths of images and videos start; null is the folder of a local file."""
    limit: int | None = None
    """First rows only; null is all."""
    shuffle: bool = False
    """Rows in an order drawn by the seed instead of their own."""
    val_rows: int = 0
    """Rows set apart as split val, the first in that order."""
    max_tokens: int | None = None
    """Most tokens of a prompt; what is more is cut as the authors do. Null leaves it whole."""
    most_new_tokens: int | None = None
    """Most tokens of an answer, below the benchmark's own; null is its own."""

    def __post_init__(self) -> None:
        require(
            [
                (bool(self.path), f"task.{self.name}.path to be a hub id, a file or a folder", self.path),
                (self.limit is None or self.limit >= 1, f"task.{self.name}.limit of at least 1", self.limit),
                (self.val_rows >= 0, f"task.{self.name}.val_rows of 0 or more", self.val_rows),
                (
                    self.max_tokens is None or self.max_tokens >= 1,
                    f"task.{self.name}.max_tokens of at least 1",
                    self.max_tokens,
                ),
                (
                    self.most_new_tokens is None or self.most_new_tokens >= 1,
                    f"task.{self.name}.most_new_tokens of at least 1",
                    self.most_new_tokens,
                ),
            ]
        )

    @property
    def comparable(self) -> bool:
        """Whether the score is the authors'; not where they ask a language model to judge and nobody is asked here."""
        return True

    @abstractmethod
    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """What a row asks; its id, chance and limit are filled in."""

    def open(self) -> Rows:
        """The rows as they are stored."""
        found = open_source(self.source)
        assert isinstance(found, Rows)
        return found

    @property
    def source(self) -> SourceConfig:
        """Where the rows are: a file, which has no splits, a folder's file of the subset's or split's name, or all of it."""
        path, stems = Path(self.path), (self.subset, self.data_split)
        files = [path / f"{stem}{kind}" for stem in stems for kind in FILES] if path.is_dir() else [path]
        file = next((file for file in files if file.is_file()), None)
        if file is not None:
            return SourceConfig(str(file), "train")
        return SourceConfig(self.path, self.data_split, self.subset, self.revision)

    @property
    def part(self) -> str:
        """What part of the benchmark this is, for ids."""
        return self.subset or self.data_split

    @cached_property
    def rows(self) -> Rows:
        """The rows, opened when they are first asked for.

        Raises:
            ValueError: in one sentence, for a data set that is missing, gated, or of another schema.
        """
        try:
            found = self.open()
        except ValueError as error:
            raise ValueError(
                f"{self.name}: {error}".replace("data.sources[].path", f"task.{self.name}.path")
            ) from error
        check_row(self.name, found[0], self.schema)
        return found

    def numbers(self, seed: int, split: str) -> list[int]:
        """Numbers of the rows of a split, in order.

        Raises:
            ValueError: for training rows, and for validation rows where none are set apart.
        """
        if split == "train" or (split == "val" and not self.val_rows):
            mend = "train on other rows" if split == "train" else f"set task.{self.name}.val_rows to set some apart"
            raise ValueError(f"{self.name} has no rows of split {split}: they are for evaluation; {mend}")
        order = list(range(len(self.rows)))
        if self.shuffle:
            order = np.random.default_rng([seed, len(order)]).permutation(len(order)).tolist()
        order = order[: self.limit]
        return order[: self.val_rows] if split == "val" else order[self.val_rows :]

    def available(self, split: str, wanted: int) -> int:
        """At most as many examples as there are rows; says so where that is fewer."""
        there = len(self.numbers(0, split))
        if there < wanted:
            log.warning("%s has %d rows of split %s and %d were asked for: it is run on those", self.name, there, split, wanted)  # fmt: skip
        return min(there, wanted)

    def example(
        self, seed: int, split: str, index: int, *, style: str = "natural", n_turns: int | None = None
    ) -> Example:
        """The row at a place of the order.

        Raises:
            ValueError: beyond the last row, for the embedded model's vocabulary, and for a row that cannot be read.
        """
        if style != "natural":
            raise ValueError(f"{self.name} is worded in English; set model.prompt_style=natural and model.name")
        numbers = self.numbers(seed, split)
        if not 0 <= index < len(numbers):
            raise ValueError(f"{self.name} has {len(numbers)} rows of split {split}, got index {index}")
        row = self.rows[numbers[index]]
        check_row(self.name, row, self.schema)
        try:
            found = self.build(row, self.rng(seed, split, numbers[index]))
        except BadRow as error:
            raise ValueError(f"{self.name}: cannot read row {numbers[index]}: {error}") from error
        return self._completed(found, f"{self.name}/{self.part}/{split}/{numbers[index]}", n_turns)

    def _completed(self, found: Example, name: str, n_turns: int | None) -> Example:
        turn = found.turns[0]
        by_chance = {"choice_letter": 1 / max(1, len(turn.choices or [])), "yes_no": 0.5}.get(turn.scorer, self.chance)
        own = {"n_images": len(found.images), "grid": None, "chance": by_chance, "comparable": self.comparable}
        limit = None if self.max_tokens is None else Limit(self.max_tokens, self.cut, self.kept)
        turns = found.turns[:n_turns]
        if self.most_new_tokens is not None:
            turns = [replace(t, max_new_tokens=min(t.max_new_tokens, self.most_new_tokens)) for t in turns]
        return replace(found, id=name, turns=turns, meta=own | found.meta, limit=limit)

    @property
    def _folder(self) -> Path | None:
        return Path(self.folder) if self.folder is not None else folder_of(self.source)

    def picture(self, value: Any) -> Segment:
        """An image of a row as a segment."""
        return Segment("image", _pixels(opened(located(value, self._folder))))

    def clip(self, value: Any, count: int) -> list[Segment]:
        """`count` frames of a video, evenly spaced from the first to the last, as segments."""
        return [Segment("image", _pixels(frame)) for frame in film(located(value, self._folder), count).frames]


def _pixels(image: Any) -> UInt8[np.ndarray, "height width 3"]:
    return np.asarray(image)
