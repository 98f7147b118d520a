"""Accuracy against bytes: which policy gives most for the memory it really takes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
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
    named_side,
    save,
    style_of,
)
from retention.evaluation.tables import size_text


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other matches at fewer bytes, nor beats at as many; by bytes, physical and after the last eviction."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda r: (r["kv_bytes_kept"], -r["accuracy"])):
        if not front or row["accuracy"] > front[-1]["accuracy"]:
            front.append(row)
    return front


def pareto_curves(summary: Sequence[Row], path: Path, *, protocol: str | None = None) -> Path:
    """Accuracy over physical bytes per context after eviction, a panel per task.

    The Pareto front among evicting policies is ringed; the dashed line is the full cache, with its bytes.
    """
    protocol = protocol or chosen(summary, "any protocol")[0]["protocol"]
    rows = chosen((r for r in summary if r["protocol"] == protocol), f"protocol {protocol!r}")
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(5.8 * len(tasks), 4.4), layout="constrained")
    numbers = []
    for ax, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        frame(ax, task, "bytes per context, physical, after eviction", "accuracy")
        numbers += _panel(ax, [row for row in rows if row["task"] == task], lines_of(rows))
    header = ("task", "policy", "scope", "budget", "kv_bytes_kept", "accuracy", "low", "high", "on_front")
    return save(figure, path, header, numbers)


def _panel(ax: Axes, rows: list[Row], everywhere: dict) -> list[list]:
    """One task; gives the numbers drawn."""
    known = [row for row in rows if row["kv_bytes_kept"] is not None and row["accuracy"] is not None]
    whole = next((row for row in known if row["policy"] == "full"), None)
    below = [row for row in known if row["policy"] != "full"] or known
    front, ends, lines = pareto_front(below), [], lines_of(known)
    at, side = named_side([(line[0]["accuracy"], line[-1]["accuracy"]) for line in lines.values()])
    sizes = [row["kv_bytes_kept"] for row in below]
    span = (min(sizes), max(sizes))
    for key, line in lines.items():
        line = sorted(line, key=lambda row: row["kv_bytes_kept"])
        style = style_of(everywhere, key)
        values = [(row["accuracy"], row["ci_low"], row["ci_high"]) for row in line]
        draw(ax, [row["kv_bytes_kept"] for row in line], values, style)
        ends.append((line[at]["kv_bytes_kept"], values[at][0], name_of(everywhere, key), style["color"]))
    if whole is not None:
        ax.plot(span, [whole["accuracy"]] * 2, color="#333333", linestyle="--", linewidth=1.3, zorder=2)
        ends.append((span[at], whole["accuracy"], f"full, {size_text(whole['kv_bytes_kept'])}", "#333333"))
    xs, ys = [row["kv_bytes_kept"] for row in front], [row["accuracy"] for row in front]
    ax.plot(xs, ys, drawstyle="steps-post", color="#9a9a9a", linewidth=1.0, zorder=1)
    ax.plot(xs, ys, "o", markersize=12, markerfacecolor="none", markeredgecolor="#333333", zorder=6)
    powers = np.arange(np.floor(np.log2(span[0])), np.ceil(np.log2(span[1])) + 1)
    ticks = list(2.0 ** powers[:: -(-len(powers) // 6)])
    doubling_axis(ax, ticks, [size_text(tick) for tick in ticks], side)
    label(ax, ends, span[0] * 0.8 if at == 0 else span[1] * 1.25, side)
    chosen_rows = {id(row) for row in front}
    cells = ("task", "policy", "scope", "budget", "kv_bytes_kept", "accuracy", "ci_low", "ci_high")
    return [[*(row[name] for name in cells), int(id(row) in chosen_rows)] for row in known]
