"""Accuracy by what benchmarks group their questions by: difficulty, length, subject, kind of question, depth."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
SETTING = ("task", "policy", "scope", "protocol", "budget")


def by_group(rows: Iterable[Row]) -> list[Row]:
    """One row per setting, name of a grouping and group: accuracy, contexts, and shares that were readable or cut off.

    A context counts once, by the mean of its turns and training seeds. Settings without groups have none.
    """
    cells: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if row["error"] is None:
            setting = *(row[name] for name in SETTING[:-1]), row["budget"]["requested"]
            for name, value in (row.get("groups") or {}).items():
                cells[*setting, name, str(value)].append(row)
    found = []
    for key, own in cells.items():
        scores: dict[str, list[float]] = defaultdict(list)
        for row in own:
            scores[row["example_id"]].append(float(row["score"]))
        means = [sum(values) / len(values) for values in scores.values()]
        found.append(
            dict(zip((*SETTING, "by", "group"), key, strict=True))
            | {"n_contexts": len(means), "accuracy": sum(means) / len(means)}
            | {"readable": _share(own, "readable"), "cut_off": _share(own, "cut_off")}
        )
    return found


def _share(rows: list[Row], name: str) -> float | None:
    known = [bool(row[name]) for row in rows if row.get(name) is not None]
    return sum(known) / len(known) if known else None
