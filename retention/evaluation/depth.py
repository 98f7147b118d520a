"""Accuracy by where the evidence lies in its context, and by how far it lies before the end of it."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from retention.evaluation.statistics import bootstrap_interval

Row = dict[str, Any]
BINS = 5
"""Equal parts of a context, from its first token to its last."""
SETTING = ("task", "policy", "scope", "protocol")


def by_depth(rows: Iterable[Row], *, bins: int = BINS, resamples: int = 2000) -> list[Row]:
    """Accuracy per setting, budget and part of the context that the evidence of a question lies in on average.

    Intervals are of a bootstrap over contexts. Rows whose evidence is not known are left out.
    """

    def part(row: Row) -> int | None:
        return None if row.get("depth") is None else min(int(row["depth"] * bins), bins - 1)

    return [row | {"depth": (row["part"] + 0.5) / bins} for row in _by(rows, part, resamples)]


def by_distance(rows: Iterable[Row], *, resamples: int = 500) -> list[Row]:
    """The same by octave of the distance: `distance` 64 is evidence 64 to 127 positions before its context ends."""

    def part(row: Row) -> int | None:
        return None if row.get("distance") is None else int(np.log2(max(row["distance"], 1)))

    return [row | {"distance": 2 ** row["part"]} for row in _by(rows, part, resamples)]


def _by(rows: Iterable[Row], part: Callable[[Row], int | None], resamples: int) -> list[Row]:
    """Accuracy per setting, budget and number of a part; rows without one are left out."""
    cells: dict[tuple, dict[tuple, list[float]]] = defaultdict(lambda: defaultdict(list))
    trained: set[str] = set()
    for row in rows:
        if row["error"] is None and row.get("scored", True) and (number := part(row)) is not None:
            key = *(row[name] for name in SETTING), row["budget"]["requested"], number
            cells[key][row["seed_data"], row["example_id"]].append(float(row["score"]))
            trained |= {row["policy"]} if row["seed_train"] is not None else set()
    found = []
    for key, contexts in sorted(cells.items(), key=lambda item: (*map(str, item[0][:-1]), item[0][-1])):
        means = [float(np.mean(scores)) for scores in contexts.values()]
        ends = bootstrap_interval(means, resamples=resamples)
        low, high = (None if np.isnan(end) else end for end in ends)
        found.append(
            dict(zip((*SETTING, "budget", "part"), key, strict=True))
            | {"accuracy": float(np.mean(means)), "low": low, "high": high}
            | {"n": sum(map(len, contexts.values())), "n_contexts": len(means), "learned": key[1] in trained}
        )
    return found
