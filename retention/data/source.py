"""Where rows come from: what a user writes of a data set, and JSON lines read in place."""

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from retention.data.media import BadRow
from retention.types import require


@dataclass
class SourceConfig:
    """One data set: where it is, which part of it, and how much it counts among others."""

    path: str = ""
    """A file (.jsonl, .json, .parquet, .csv), a folder of images or of such files, or a hub id."""
    split: str = "train"
    """Split of a hub data set or folder; also slices like train[:1000]."""
    name: str | None = None
    """Configuration of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    weight: float | None = None
    """Share of the rows drawn, relative to the other sources; null in all of them reads every row once per epoch."""
    streaming: bool = False
    """Read rows in order while they are downloaded instead of all before; JSON lines are always read in place."""
    columns: dict[str, str] = field(default_factory=dict)
    """Which column holds what a known name stands for, e.g. {prompt: instruction, response: output}."""
    folder: str | None = None
    """Where relative paths of images start; null is the folder of a local file."""

    def __post_init__(self) -> None:
        require(
            [
                (bool(self.path), "data.sources[].path to be a file, a folder or a hub id", self.path),
                (self.weight is None or self.weight > 0, "data.sources[].weight above 0", self.weight),
            ]
        )


@runtime_checkable
class Rows(Protocol):
    """A source whose rows are reached by their number."""

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        """The raw row of a number; raises BadRow where it cannot be read."""


@runtime_checkable
class Stream(Protocol):
    """A source that is read in order, again from its beginning once it has ended."""

    def after(self, number: int) -> Iterator[Mapping[str, Any] | BadRow]:
        """Rows from a number onwards, without end."""


class JsonLines:
    """A file of one JSON object per line, read where it lies: no cache, and a line of nonsense costs one row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        starts, place = array("q"), 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    starts.append(place)
                place += len(line)
        self.starts: Int[np.ndarray, " rows"] = np.array(starts, dtype=np.int64)

    def __len__(self) -> int:
        """Lines that are not empty."""
        return len(self.starts)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        """The object on a line."""
        with self.path.open("rb") as file:
            file.seek(int(self.starts[number]))
            return _object(file.readline())


class JsonFile:
    """A file with one JSON list of objects, as LLaVA's data sets are, or with an object that has one under `data`.

    `head` is what else such an object holds.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.rows = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"expected a list of JSON objects in {path}, got no JSON; one per line is .jsonl"
            ) from error
        self.head: Mapping[str, Any] = {}
        if isinstance(self.rows, dict) and isinstance(self.rows.get("data"), list):
            self.head = {name: value for name, value in self.rows.items() if name != "data"}
            self.rows = self.rows["data"]
        if not isinstance(self.rows, list):
            raise ValueError(f"expected a list of JSON objects in {path}, got {type(self.rows).__name__}")

    def __len__(self) -> int:
        """Length of the list."""
        return len(self.rows)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        """One object of the list."""
        return _checked(self.rows[number])


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        return _checked(json.loads(line))
    except ValueError as error:
        raise BadRow("not JSON", str(error)) from error


def _checked(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadRow("not JSON", f"a {type(value).__name__} where an object belongs")
    return value
