"""The rows of a run on disk: appended batch by batch, so that a stopped evaluation continues where it was."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from retention.files import write_text

Row = dict[str, Any]
Key = tuple[str, str, str, str, int | None]
NAME = "examples"


def cell_key(row: Row) -> Key:
    """What a row belongs to: task, policy, protocol, requested budget, training seed."""
    return row["task"], row["policy"], row["protocol"], row["budget"]["requested"], row["seed_train"]


class RowStore:
    """`examples.jsonl` of a run, one row per answer; every further process of a run writes a file of its own."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.file = folder / (f"{NAME}.{rank}.jsonl" if rank else f"{NAME}.jsonl")
        self.rows: list[Row] = []
        self.done: set[tuple] = set()
        self._take(_mended(self.file))
        for file in self._others():
            self._take(_complete(file))
        self.reused = len(self.rows)

    def _others(self) -> list[Path]:
        return sorted(file for file in self.folder.glob(f"{NAME}*.jsonl") if file != self.file)

    def _take(self, rows: list[Row]) -> None:
        """Rows that are new."""
        fresh = [row for row in rows if (*cell_key(row), row["example_id"]) not in self.done]
        self.rows += fresh
        self.done |= {(*cell_key(row), row["example_id"]) for row in fresh}

    def has(self, key: Key, example_ids: Iterable[str]) -> bool:
        """Whether all these contexts of a cell are done."""
        return all((*key, example_id) in self.done for example_id in example_ids)

    def add(self, rows: list[Row]) -> None:
        """Append what is new of the rows of one batch of a cell, whole contexts, and sync them to disk."""
        rows = [row for row in rows if (*cell_key(row), row["example_id"]) not in self.done]
        with self.file.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows
        self.done |= {(*cell_key(row), row["example_id"]) for row in rows}

    def gather(self) -> None:
        """Put what the other processes wrote into this one's file, when they have ended, and remove theirs."""
        others = self._others()
        for file in others:
            self._take(_complete(file))
        if others:
            write_text(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))
        for file in others:
            file.unlink()


def _complete(file: Path) -> list[Row]:
    """Rows of the contexts that are whole; a line may have been cut off by a kill."""
    text = file.read_text() if file.exists() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    turns: dict[tuple, int] = {}
    for row in rows:
        key = (*cell_key(row), row["example_id"])
        turns[key] = turns.get(key, 0) + 1
    return [row for row in rows if turns[(*cell_key(row), row["example_id"])] == row["n_turns"]]


def _mended(file: Path) -> list[Row]:
    """The same, and the file without what is not whole."""
    rows = _complete(file)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if file.exists() and file.read_text() != text:
        write_text(file, text)
    return rows
