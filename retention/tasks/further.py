"""What the rows of a task tell besides their mean score: other scores of the same answers, the worst turn, a penalty."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from statistics import fmean
from typing import Any

from retention.tasks.scorers import SCORERS
from retention.tasks.scorers.lists import integers

Row = dict[str, Any]
"""An answer as an evaluation stores it."""
COMPANIONS = {"index_triplet": "index_only", "list_soft": "list_exact", "anls": "exact"}
"""What else an answer is scored by: the image alone, the whole list, the very words."""


def counted(rows: Iterable[Row]) -> list[Row]:
    """Rows of turns that are scored and were answered."""
    return [row for row in rows if row["scored"] and row["error"] is None]


def companions(rows: Iterable[Row]) -> dict[str, float]:
    """The companion scores of answers whose scorers have one, by name."""
    told = [row for row in counted(rows) if row["scorer"] in COMPANIONS]
    return {
        COMPANIONS[name]: _mean(
            (row for row in told if row["scorer"] == name),
            lambda row: SCORERS[COMPANIONS[row["scorer"]]](row["prediction"], row["answer"]),
        )
        for name in sorted({row["scorer"] for row in told})
    }


def worst(rows: Iterable[Row]) -> dict[str, float]:
    """`worst`: the lowest score among the turns of a context, on average over contexts and training seeds."""
    turns: dict[Hashable, list[float]] = defaultdict(list)
    for row in counted(rows):
        turns[_context(row)].append(float(row["score"]))
    return {"worst": fmean(map(min, turns.values()))} if turns else {}


def asked_again(rows: Iterable[Row]) -> dict[str, float]:
    """`asked_again`: the score of turns whose question an earlier turn of their context had, where there are any."""
    first: dict[Hashable, int] = {}
    own = sorted(counted(rows), key=lambda row: row["turn"])
    for row in own:
        first.setdefault((*_context(row), row["question"]), row["turn"])
    again = [row for row in own if first[*_context(row), row["question"]] < row["turn"]]
    return {"asked_again": mean_score(again)} if again else {}


def number_error(rows: Iterable[Row]) -> dict[str, float]:
    """`mae`: how far the number said is from the right one on average; `numbers`: the share of answers that are one.

    Answers without a number have no distance and are left out of `mae`.
    """
    own = counted(rows)
    said = [row for row in own if integers(row["prediction"])]
    share = {"numbers": len(said) / len(own)} if own else {}
    far = _mean(said, lambda row: abs(integers(row["prediction"])[0] - int(row["answer"]))) if said else None
    return share if far is None else share | {"mae": far}


def mean_score(rows: Iterable[Row]) -> float:
    """The score over contexts and training seeds, each by the mean of its turns; of one row or more."""
    return _mean(rows, lambda row: float(row["score"]))


def gap(rows: Iterable[Row], by: str, one: str, other: str) -> float | None:
    """Score in group `one` less that in group `other`, over the clusters and training seeds that are in both.

    `by` names the grouping. None where no cluster is in both.
    """
    sides: dict[str, dict[Hashable, list[float]]] = {one: defaultdict(list), other: defaultdict(list)}
    for row in counted(rows):
        side = sides.get(row["groups"].get(by, ""))
        if side is not None:
            side[row["seed_train"], row["cluster"]].append(float(row["score"]))
    both = sides[one].keys() & sides[other].keys()
    return fmean(fmean(sides[one][key]) - fmean(sides[other][key]) for key in both) if both else None


def _mean(rows: Iterable[Row], value: Callable[[Row], float]) -> float:
    """Mean of a value over contexts and training seeds, each by the mean of its turns."""
    found: dict[Hashable, list[float]] = defaultdict(list)
    for row in rows:
        found[_context(row)].append(value(row))
    return fmean(fmean(values) for values in found.values())


def _context(row: Row) -> tuple[int | None, str]:
    return row["seed_train"], row["example_id"]
