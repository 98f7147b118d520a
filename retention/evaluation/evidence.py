"""Evidence recall over the kept part of the cache, beside the accuracy: whether answers fail for what was evicted."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from retention.evaluation.drawing import (
    Row,
    chosen,
    doubling_axis,
    draw,
    frame,
    label,
    lines_of,
    name_of,
    save,
    style_of,
)

MEASURES = {
    "accuracy": "accuracy",
    "evidence_recall_any": "evidence held anywhere",
    "evidence_recall_weighted": "evidence held, by full attention",
}
"""Columns of a summary that are drawn, and what their panels are called."""


def recalled(summary: Sequence[Row], task: str, protocol: str) -> list[Row]:
    """Rows below the full cache of one task and protocol that know what became of the evidence."""
    own = (row for row in summary if (row["task"], row["protocol"]) == (task, protocol))
    return [row for row in own if row["policy"] != "full" and row["evidence_recall_any"] is not None]


def recall_curves(summary: Sequence[Row], path: Path, task: str, *, protocol: str) -> Path:
    """A panel per measure, of those that the summary has; rows from `summarise`.

    Raises:
        ValueError: where no row of the task and protocol knows its evidence.
    """
    rows = chosen(recalled(summary, task, protocol), f"evidence of {task!r} under {protocol!r}")
    lines, measures = lines_of(rows), [name for name in MEASURES if any(row[name] is not None for row in rows)]
    ticks = {row["budget"]: row["budget_fraction"] for row in rows}
    ordered = sorted(ticks, key=lambda budget: ticks[budget])
    figure = Figure(figsize=(5.4 * len(measures), 4.4), layout="constrained")
    numbers: list[list] = []
    for ax, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        ends = []
        frame(ax, f"{task}, {MEASURES[measure]}", "kept part of the cache", MEASURES[measure])
        ax.set_ylim(-0.04, 1.06)
        for key, line in lines.items():
            known = [row for row in line if row[measure] is not None]
            banded = measure == "accuracy"  # recall has no interval of its own
            values = [(r[measure], r["ci_low"], r["ci_high"]) if banded else (r[measure], None, None) for r in known]
            xs = [row["kept_fraction"] or row["budget_fraction"] for row in known]
            style = style_of(lines, key)
            draw(ax, xs, values, style)
            ends.append((xs[-1], values[-1][0], name_of(lines, key), style["color"]))
            numbers += [[measure, *key, x, value[0]] for x, value in zip(xs, values, strict=True)]
        doubling_axis(ax, [ticks[b] for b in ordered], [f"{100 * ticks[b]:.3g}%" for b in ordered], "left")
        label(ax, ends, ticks[ordered[-1]] * 1.25, "left")
    return save(figure, path, ("measure", "policy", "scope", "kept_fraction", "value"), numbers)
