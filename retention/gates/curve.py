"""Accuracy by budget as validation measured it: read off an artefact's record, and drawn beside its card."""

import io
import math
from dataclasses import dataclass
from typing import Any

from retention.budget import Budget

SCOPES = {"global": "one pool", "per_head": "head by head"}
"""How validation evicts, by the words of its record."""
MOST = 32
"""Budgets that a curve shows; no validation measures as many."""
STYLES = {
    "global": {"color": "#D55E00", "marker": "o", "linestyle": "-", "linewidth": 2.4},
    "per_head": {"color": "#0072B2", "marker": "s", "linestyle": (0, (4, 1.5)), "linewidth": 1.4},
}
"""Of lines by scope: colours that colour-blind readers tell apart, as in reports."""


@dataclass
class Curve:
    """Accuracies under hard eviction on validation contexts, 0 to 1."""

    budgets: dict[str, dict[str, float]]
    """By budget, the largest first, and scope."""
    full: float | None
    """With the full cache, where it was measured."""


def measured(validation: Any) -> Curve | None:
    """The curve of a record, which a stranger may have written; None where it holds no measurement."""
    found: dict[str, dict[str, float]] = {}
    for key, value in validation.items() if isinstance(validation, dict) else ():
        scope, _, budget = str(key).partition(" ")
        if scope in SCOPES and type(value) in (int, float) and 0 <= value <= 1:
            found.setdefault(budget, {})[scope] = float(value)
    full = found.pop("full", {}).get("global")
    if not found and full is None:
        return None
    return Curve({budget: found[budget] for budget in sorted(found, key=_size, reverse=True)[:MOST]}, full)


def picture(curve: Curve | None) -> bytes | None:
    """The curve as a PNG; budgets stand equally far apart, the largest first, since they may be of several units.

    None where there is no curve, or no budget in it that can be read.
    """
    names = [] if curve is None else [budget for budget in curve.budgets if _size(budget)[0]]
    if curve is None or not names:
        return None
    from matplotlib.figure import Figure  # here, for its import takes a while and few artefacts are written

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = figure.subplots()
    for scope, style in STYLES.items():
        values = [curve.budgets[name].get(scope, math.nan) for name in names]
        if not all(map(math.isnan, values)):
            ax.plot(range(len(names)), values, label=SCOPES[scope], **style)  # type: ignore[arg-type]  # mixed kinds
    if curve.full is not None:
        ax.axhline(curve.full, color="#333333", linestyle="--", linewidth=1.3, label="full cache", zorder=1)
    ax.set_xticks(range(len(names)), [name[:12] for name in names])
    ax.set_ylim(-0.04, 1.06)
    ax.set_xlabel("kept part of the cache, or entries per head")
    ax.set_ylabel("accuracy, validation")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False)
    content = io.BytesIO()
    figure.savefig(
        content, format="png", dpi=150, facecolor="white", metadata={"Software": None}
    )  # the same bytes again
    return content.getvalue()


def _size(budget: str) -> tuple[str, float]:
    """Where a budget stands; what is none stands last."""
    try:
        parsed = Budget.parse(budget)
    except ValueError:
        return ("", 0.0)
    return (parsed.unit, parsed.amount)
