"""What may be said of a table: paired comparisons with the full cache and the best baseline, Holm's over all of them."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retention.evaluation.config import QUOTA, base_name
from retention.evaluation.equality import FLOOR, plain, shown
from retention.evaluation.statistics import holm, paired_difference, paired_p_value
from retention.policies import POLICIES
from retention.policies.collect import Foresight

Row = dict[str, Any]
ALPHA = 0.05
BETTER, WORSE, OPEN = "better", "worse", "no difference shown"
RULES = (
    "Better and worse are said only where the paired 95% interval (bootstrap over contexts and training seeds) excludes "
    "0 and the p-value of a paired sign-flip test, adjusted by Holm's step-down over all comparisons below, is under 0.05.",
    "The best baseline is the policy without gates that has the highest mean accuracy on these very answers. Choosing it "
    "so flatters it: a policy that is better beats it all the same, while a baseline that is worse than it may be as good.",
    "Nothing is called better where random+protect, or the gates' shares with another score (quota+X), lies inside the "
    "interval of its accuracy. What is worse is always said.",
)
"""How the verdicts of this file come about, in sentences for a reader."""


@dataclass
class Cell:
    """The scores of one policy at one budget of a task under a protocol, by (training seed, context, turn)."""

    policy: str
    scope: str
    scores: dict[tuple, float] = field(default_factory=dict)
    clusters: dict[Hashable, Hashable] = field(default_factory=dict)

    @property
    def learned(self) -> bool:
        """Whether trained gates take part."""
        return any(seed is not None for seed, _, _ in self.scores)

    def mean(self) -> float:
        """Accuracy, contexts weighing alike."""
        by_context: dict[Hashable, list[float]] = defaultdict(list)
        for (_, context, _), score in self.scores.items():
            by_context[context].append(score)
        return float(np.mean([np.mean(scores) for scores in by_context.values()]))


def is_baseline(policy: str) -> bool:
    """Whether a policy can be the best baseline: a heuristic that reads neither answers nor evidence."""
    kind = POLICIES.get(base_name(plain(policy)))
    if kind is None or plain(policy) in ("full", FLOOR):
        return False
    return not kind.needs_evidence and not isinstance(kind().second_pass(), Foresight)


def compare_all(rows: Iterable[Row], summary: Sequence[Row]) -> list[Row]:
    """Every setting of a summary against the full cache and against the best baseline of its task, protocol and budget.

    One row per comparison: difference with its interval, p, Holm's p over all rows, and the verdict.
    """
    cells, found = _cells(rows), []
    intervals = {(*_key(row), row["policy"], row["scope"]): row for row in summary}
    whole = {key[:2]: own["full"] for key, own in cells.items() if "full" in own}
    for key, own in cells.items():
        below = [cell for cell in own.values() if cell.policy != "full"]
        best = max((c for c in below if not c.learned and is_baseline(c.policy)), key=Cell.mean, default=None)
        for cell in below:
            row = intervals[*key, cell.policy, cell.scope]
            for against, other in (("full", whole.get(key[:2])), ("best baseline", best)):
                gap = None if other in (None, cell) else _compared(cell, other)
                if gap is not None:
                    told = dict(zip(("task", "protocol", "budget"), key, strict=True))
                    found.append(told | gap | {"against": against, "withheld": _withheld(row, below, cell)})
    adjusted = holm([row["p"] for row in found]) if found else []
    return [row | {"p_holm": p, "verdict": _verdict(row, p)} for row, p in zip(found, adjusted, strict=True)]


def _key(row: Row) -> tuple[str, str, str]:
    return row["task"], row["protocol"], row["budget"]


def _cells(rows: Iterable[Row]) -> dict[tuple, dict[str, Cell]]:
    """Cells by task, protocol and budget, then by name; rows with errors and unscored ones are left out."""
    found: dict[tuple, dict[str, Cell]] = defaultdict(dict)
    for row in rows:
        if row["error"] is None and row.get("scored", True):
            own = found[row["task"], row["protocol"], row["budget"]["requested"]]
            name = "full" if row["policy"] == "full" else f"{row['policy']} {row['scope']}"
            cell = own.setdefault(name, Cell(row["policy"], row["scope"]))
            context = (row["seed_data"], row["example_id"])
            cell.scores[row["seed_train"], context, row["turn"]] = float(row["score"])
            cell.clusters[context] = row.get("cluster", context)
    return found


def gaps(one: Cell, other: Cell) -> tuple[NDArray[np.float64], list[Hashable]]:
    """Differences in score on the turns both answered, [seeds, contexts], and the contexts' clusters.

    The same training seed is paired with itself; what has no seed goes with every seed of the other.
    """
    seeds = [list(dict.fromkeys(seed for seed, _, _ in cell.scores)) for cell in (one, other)]
    same = [(seed, seed) for seed in seeds[0] if seed in seeds[1]]
    pairs = same or list(product(*seeds))
    contexts = {context: i for i, context in enumerate(one.clusters)}
    total, count = np.zeros((2, len(pairs), len(contexts)))
    for i, (mine, theirs) in enumerate(pairs):
        for (seed, context, turn), score in one.scores.items():
            reference = other.scores.get((theirs, context, turn)) if seed == mine else None
            if reference is not None:
                total[i, contexts[context]] += score - reference
                count[i, contexts[context]] += 1
    matrix = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return matrix, [one.clusters[context] for context in contexts]


def _compared(one: Cell, other: Cell) -> Row | None:
    """One comparison; None where the two share no answer."""
    matrix, clusters = gaps(one, other)
    known = np.isfinite(matrix).any(axis=0)
    if not known.any():
        return None
    gap, low, high = paired_difference(matrix, np.zeros_like(matrix), clusters=clusters)
    return {
        **{"policy": one.policy, "scope": one.scope, "learned": one.learned, "reference": other.policy},
        **{"difference": gap, "low": low, "high": high},
        "p": paired_p_value(matrix, np.zeros_like(matrix), clusters=clusters),
        **{"n": len(one.scores), "n_contexts": int(known.sum())},
        "n_seeds": len({seed for seed, _, _ in one.scores} - {None}),
    }


def _withheld(row: Row, below: list[Cell], cell: Cell) -> str | None:
    """The floor that lies inside the interval of a policy's accuracy; None where none does."""
    for other in below:
        shares = other.policy.startswith(QUOTA) and cell.learned and not cell.policy.startswith(QUOTA)
        if other is not cell and (other.policy == FLOOR or shares) and row["ci_low"] <= other.mean() <= row["ci_high"]:
            return shown(other.policy)
    return None


def _verdict(row: Row, p: float) -> str:
    if p >= ALPHA or row["low"] <= 0 <= row["high"]:
        return OPEN
    if row["high"] < 0:
        return WORSE
    return BETTER if row["withheld"] is None else f"no claim: {row['withheld']} is inside the interval"
