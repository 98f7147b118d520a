"""What may be said of a table: paired comparisons with the full cache and the best baseline, Holm's over all of them."""

import math
from collections import defaultdict
from collections.abc import Container, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retention.evaluation.config import QUOTA, base_name
from retention.evaluation.equality import FLOOR, plain, shown
from retention.evaluation.statistics import gap_to_best, holm
from retention.policies import POLICIES
from retention.policies.collect import Foresight

Row = dict[str, Any]
ALPHA = 0.05
BETTER, WORSE, OPEN = "better", "worse", "no difference shown"
FLIPS, FLIPS_EACH = 20_000, 100
"""Sign flips of a test at least, and for every comparison of the table: the smallest p outlives Holm's factor."""
RULES = (
    "Better and worse are said only where the paired 95% interval (bootstrap over contexts and training seeds) excludes "
    "0 and the p-value of a paired sign-flip test, adjusted by Holm's step-down over all comparisons below, is under 0.05.",
    "The baselines are all policies without gates, but for random+protect and what is told the answers; every policy is held "
    "against the best of the others, chosen on these very answers. Interval and p account for the choice: better than the "
    "best is better than each of them, and worse is tested against all of them at once.",
    "Nothing is called better where random+protect was not run, or where it, or the gates' shares with another score "
    "(quota+X), lies inside or above the interval of its accuracy. What is worse is always said.",
)
"""How the verdicts of this file come about."""


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

    def mean(self, contexts: Container[Hashable]) -> float:
        """Accuracy on those of the contexts that were answered, each weighing alike; NaN where none was."""
        by_context: dict[Hashable, list[float]] = defaultdict(list)
        for (_, context, _), score in self.scores.items():
            if context in contexts:
                by_context[context].append(score)
        return float(np.mean([np.mean(scores) for scores in by_context.values()])) if by_context else np.nan


def is_baseline(policy: str) -> bool:
    """Whether a policy is one of the baselines: a heuristic without gates that reads neither answers nor evidence."""
    kind = POLICIES.get(base_name(plain(policy)))
    if kind is None or plain(policy) in ("full", FLOOR):
        return False
    made = kind()
    return not (made.needs_gates or made.needs_evidence or isinstance(made.second_pass(), Foresight))


def compare_all(rows: Iterable[Row], summary: Sequence[Row]) -> list[Row]:
    """Every setting of a summary against the full cache and the best baseline of its task, protocol and budget.

    One row per comparison: difference with its interval, p, Holm's p over all rows, and the verdict.
    """
    cells, found = _cells(rows), []
    intervals = {(*_key(row), row["policy"], row["scope"]): row for row in summary}
    whole = {key[:2]: own["full"] for key, own in cells.items() if "full" in own}
    flips = max(FLIPS, FLIPS_EACH * 2 * sum(map(len, cells.values())))
    for key, own in cells.items():
        below = [cell for cell in own.values() if cell.policy != "full"]
        baselines = [cell for cell in below if not cell.learned and is_baseline(cell.policy)]
        for cell in below:
            row = intervals[*key, cell.policy, cell.scope]
            full = [whole[key[:2]]] if key[:2] in whole else []
            for against, others in (("full", full), ("best baseline", [x for x in baselines if x is not cell])):
                gap = _compared(cell, others, flips)
                if gap is not None:
                    told = dict(zip(("task", "protocol", "budget"), key, strict=True))
                    found.append(told | gap | {"against": against, "withheld": _withheld(row, below, cell)})
    adjusted = holm([row["p"] for row in found]) if found else []
    return [row | {"p_holm": p, "verdict": _verdict(row, p)} for row, p in zip(found, adjusted, strict=True)]


def rules(claims: Sequence[Row]) -> list[str]:
    """How the verdicts of a table come about and what it is too small for, in sentences for a reader."""
    weak = weakness(claims)
    return [*RULES, f"{len(claims)} comparisons, differences in points of accuracy.", *([weak] if weak else [])]


def weakness(claims: Sequence[Row]) -> str | None:
    """One sentence where comparisons rest on too few contexts to come out as better or worse; None where none does."""
    weak = [claim for claim in claims if 2.0 ** (1 - claim["n_clusters"]) * len(claims) >= ALPHA]
    if not weak:
        return None
    needed = math.floor(math.log2(len(claims) / ALPHA)) + 2
    return (
        f"{len(weak)} of {len(claims)} comparisons rest on so few contexts that no difference, however steady, stands out "
        f"among so many comparisons by itself: that takes {needed} contexts (or clusters of them)."
    )


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


def gaps(one: Cell, other: Cell) -> tuple[NDArray[np.float64], int]:
    """Differences in score on the turns both answered, [seeds, contexts of the one], and how many turns that are.

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
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0), int(count.sum())


def _compared(one: Cell, others: Sequence[Cell], flips: int) -> Row | None:
    """One against the best of the others; None where it shares no answer with any."""
    found = [(other, *gaps(one, other)) for other in others]
    found = [(other, matrix, n) for other, matrix, n in found if n]
    if not found:
        return None
    clusters = list(one.clusters.values())
    gap = gap_to_best([matrix for _, matrix, _ in found], clusters=clusters, flips=flips)
    other, matrix, n = found[gap.other]
    known = (np.isfinite(matrix).sum(axis=0) > 0).tolist()
    return {
        **{"policy": one.policy, "scope": one.scope, "learned": one.learned, "reference": other.policy},
        **{"n_references": len(found), "difference": gap.difference},
        **{name: None if np.isnan(end) else end for name, end in (("low", gap.low), ("high", gap.high))},
        **{"p": gap.p, "n": n, "n_contexts": sum(known)},
        "n_clusters": len({label for label, has in zip(clusters, known, strict=True) if has}),
        "n_seeds": len({seed for seed, _, _ in one.scores} - {None}),
    }


def _withheld(row: Row, below: list[Cell], cell: Cell) -> str | None:
    """Why nothing good may be said of a policy: the floor that its accuracy's interval does not lie above; None where it does."""
    if not any(plain(other.policy) == FLOOR for other in below):
        return f"{shown(FLOOR)} was not run"
    for other in below:
        shares = other.policy.startswith(QUOTA) and cell.learned and not cell.policy.startswith(QUOTA)
        if other is not cell and (plain(other.policy) == FLOOR or shares):
            floor = other.mean(cell.clusters)
            if row["ci_low"] is None or not floor < row["ci_low"]:
                above = row["ci_high"] is not None and floor > row["ci_high"]
                return f"{shown(other.policy)} is {'above' if above else 'inside'} the interval"
    return None


def _verdict(row: Row, p: float) -> str:
    if p >= ALPHA or row["low"] is None or row["low"] <= 0 <= row["high"]:
        return OPEN
    if row["high"] < 0:
        return WORSE
    return BETTER if row["withheld"] is None else f"no claim: {row['withheld']}"
