"""The rows of a run on disk: appended batch by batch, so that a stopped evaluation continues where it was."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Key = tuple[str, str, str, str, int | None]


def cell_key(row: Row) -> Key:
    """What a row belongs to: task, policy, protocol, requested budget, training seed."""
    return row["task"], row["policy"], row["protocol"], row["budget"]["requested"], row["seed_train"]


class RowStore:
    """`examples.jsonl` of a run, one row per answer."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[Row] = self._read()
        self.done = {(*cell_key(row), row["example_id"]) for row in self.rows}
        self.reused = len(self.rows)

    def _read(self) -> list[Row]:
        """Whole rows of an earlier try; a line that was cut off by a kill is removed from the file."""
        if not self.file.exists():
            return []
        text = self.file.read_text()
        whole = text[: text.rfind("\n") + 1]
        rows = [json.loads(line) for line in whole.splitlines()]
        turns: dict[tuple, int] = {}
        for row in rows:
            key = (*cell_key(row), row["example_id"])
            turns[key] = turns.get(key, 0) + 1
        complete = [row for row in rows if turns[(*cell_key(row), row["example_id"])] == row["n_turns"]]
        if len(complete) < len(rows) or whole != text:
            fresh = self.file.with_suffix(".tmp")
            fresh.write_text("".join(json.dumps(row) + "\n" for row in complete))
            os.replace(fresh, self.file)
        return complete

    def has(self, key: Key, example_ids: Iterable[str]) -> bool:
        """Whether all these contexts of a cell are done."""
        return all((*key, example_id) in self.done for example_id in example_ids)

    def add(self, rows: list[Row]) -> None:
        """Append the rows of one batch of a cell and sync them to disk."""
        with self.file.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows
        self.done |= {(*cell_key(row), row["example_id"]) for row in rows}
