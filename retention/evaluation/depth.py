"""Accuracy by where the evidence lies in its context."""

from collections import defaultdict
from collections.abc import Iterable
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
    cells: dict[tuple, dict[tuple, list[float]]] = defaultdict(lambda: defaultdict(list))
    trained: set[str] = set()
    for row in rows:
        if row["error"] is None and row.get("scored", True) and row.get("depth") is not None:
            part = min(int(row["depth"] * bins), bins - 1)
            key = *(row[name] for name in SETTING), row["budget"]["requested"], part
            cells[key][row["seed_data"], row["example_id"]].append(float(row["score"]))
            trained |= {row["policy"]} if row["seed_train"] is not None else set()
    found = []
    for key, contexts in sorted(cells.items(), key=lambda item: (*map(str, item[0][:-1]), item[0][-1])):
        means = [float(np.mean(scores)) for scores in contexts.values()]
        low, high = bootstrap_interval(means, resamples=resamples)
        found.append(
            dict(zip((*SETTING, "budget", "part"), key, strict=True))
            | {"depth": (key[-1] + 0.5) / bins, "accuracy": float(np.mean(means)), "low": low, "high": high}
            | {"n": sum(map(len, contexts.values())), "n_contexts": len(means), "learned": key[1] in trained}
        )
    return found
