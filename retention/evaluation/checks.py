"""What a manifest says of the rows of a run: which questions they answer, and how many hold more than their budget."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]


def questions_hash(rows: Iterable[Row]) -> str:
    """SHA-256 of all questions with their answers, each once, in the order of tasks, contexts and turns."""
    told = {
        (row["task"], row["seed_data"], row["example_id"], row["turn"], row["question"], str(row["answer"]))
        for row in rows
    }
    return hashlib.sha256(json.dumps(sorted(told)).encode()).hexdigest()


def over_budget(rows: Iterable[Row]) -> int:
    """Rows whose cache held more entries after the eviction of the context than the budget gives all layers and heads."""
    told = [row for row in rows if row["error"] is None and row["seen"]]
    return sum(row["kept"] > row["budget"]["resolved"] * (row["entries_full"] // row["seen"]) for row in told)
