"""Accuracy curves: over what is kept, by turn, by the place of the evidence; each with a CSV of its numbers."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from retention.evaluation.drawing import (
    Row,
    chosen,
    doubling_axis,
    draw,
    frame,
    label,
    learned,
    lines_of,
    name_of,
    named_side,
    save,
    style_of,
)

TURNS_APART = 0.05


def _turns(row: Row, turns: str) -> tuple[float | None, float | None, float | None]:
    """Accuracy with its bounds on the named turns."""
    if turns == "first turn":
        return row["accuracy_first_turn"], row["by_turn_low"][0], row["by_turn_high"][0]
    if turns == "later turns":
        return row["accuracy_later_turns"], row["later_turns_low"], row["later_turns_high"]
    return row["accuracy"], row["ci_low"], row["ci_high"]


def _kept(row: Row) -> float:
    return row["kept_fraction"] or row["budget_fraction"]


def _curves(ax: Axes, rows: list[Row], everywhere: Mapping, turns: str) -> list[list]:
    """Accuracy over what is kept, for one task; gives the numbers drawn."""
    ends, numbers, lines = [], [], lines_of(rows)
    outer = [(_turns(line[0], turns)[0], _turns(line[-1], turns)[0]) for line in lines.values()]
    at, side = named_side(outer)
    for key, line in lines.items():
        values, style = [_turns(row, turns) for row in line], style_of(everywhere, key)
        draw(ax, [_kept(row) for row in line], values, style)
        ends.append((_kept(line[at]), values[at][0], name_of(everywhere, key), style["color"]))
        numbers += [[turns, *key, _kept(r), *v] for r, v in zip(line, values, strict=True)]
    named = {row["budget"]: row["budget_fraction"] for line in lines.values() for row in line}
    ticks = sorted(named.values())
    doubling_axis(ax, ticks, [f"{100 * tick:.3g}%" for tick in ticks], side)
    whole = [_turns(row, turns)[0] for row in rows if row["policy"] == "full"]
    full, chance = whole[0] if whole else rows[0]["full_accuracy"], rows[0]["chance"]
    for y, name, dash in ((full, "full cache", "--"), (chance, "chance", ":")):
        if y is not None:
            span = [ticks[0], ticks[-1]]
            ax.plot(span, [y, y], color="#333333", linestyle=dash, linewidth=1.3, zorder=2)
            ends.append((ticks[at], y, name, "#333333"))
    label(ax, ends, ticks[at] * (0.8 if at == 0 else 1.25), side)
    return numbers


def accuracy_curves(summary: Sequence[Row], path: Path, *, protocol: str | None = None) -> Path:
    """Accuracy over the kept part of the cache, a panel per task, for one protocol."""
    protocol = protocol or chosen(summary, "any protocol")[0]["protocol"]
    rows = chosen((r for r in summary if r["protocol"] == protocol), f"protocol {protocol!r}")
    lines, tasks = lines_of(rows), list(dict.fromkeys(row["task"] for row in rows))
    turned = [r for r in rows if None not in (r["accuracy_later_turns"], r["accuracy_first_turn"])]
    gaps = [abs(r["accuracy_first_turn"] - r["accuracy_later_turns"]) for r in turned]
    split = ("first turn", "later turns") if max(gaps, default=0) > TURNS_APART else ("all turns",)
    figure = Figure(figsize=(5.8 * len(tasks), 4.4 * len(split)), layout="constrained")
    axes = figure.subplots(len(split), len(tasks), squeeze=False)
    numbers = []
    for (i, turns), (j, task) in product(enumerate(split), enumerate(tasks)):
        frame(axes[i, j], f"{task}, {turns}", "kept part of the cache", "accuracy")
        mine = [row for row in rows if row["task"] == task]
        numbers += [[task, *line] for line in _curves(axes[i, j], mine, lines, turns)]
    header = ("task", "turns", "policy", "scope", "kept_fraction", "accuracy", "low", "high")
    return save(figure, path, header, numbers)


def _with_protocol(rows: Sequence[Row]) -> list[Row]:
    """The rows with the parts of the protocol in which they differ added to the policy's name."""
    parts = [row["protocol"].split("/") for row in rows if row["policy"] != "full"]
    differ = [i for i, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1]
    named = []
    for row in rows:
        told = ", ".join(row["protocol"].split("/")[i] for i in differ).replace("_", " ")
        change = {"policy": f"{row['policy']} ({told})"} if told and row["policy"] != "full" else {}
        named.append(row | change)
    return named


def deferred_curve(
    summary: Sequence[Row],
    path: Path,
    task: str,
    *,
    budget: str | None = None,
    policies: Sequence[str] | None = None,
    protocols: Sequence[str] | None = None,
) -> Path:
    """Accuracy by turn at one budget (the tightest unless named), for the chosen policies.

    Protocols in which a policy sees other questions become lines of their own.
    """
    rows = [row for row in summary if row["task"] == task and len(row["accuracy_by_turn"]) > 1]
    rows = [row for row in rows if protocols is None or row["protocol"] in protocols]
    below = chosen((r for r in rows if r["policy"] != "full"), f"task {task!r} of several turns")
    budget = budget or min(below, key=lambda row: row["budget_fraction"])["budget"]
    below = [r for r in below if r["budget"] == budget and r["policy"] in (policies or r["policy"])]
    whole = [row for row in rows if row["policy"] == "full"][:1]
    lines = lines_of(_with_protocol(chosen(below, f"budget {budget!r} and policies {policies}")))
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    ax, ends, numbers = figure.subplots(), [], []
    frame(ax, f"{task}, budget {budget}", "turn", "accuracy")
    plain = {"color": "#333333", "linestyle": "--", "linewidth": 1.4, "marker": ".", "zorder": 2}
    for key, (row, *_) in [*lines.items(), *((("full cache", ""), [row]) for row in whole)]:
        style = plain if row["policy"] == "full" else style_of(lines, key)
        bounds = (row["accuracy_by_turn"], row["by_turn_low"], row["by_turn_high"])
        values = list(zip(*bounds, strict=True))
        turns = range(1, len(values) + 1)
        draw(ax, turns, values, style)
        name = "full cache" if row["policy"] == "full" else name_of(lines, key)
        ends.append((turns[-1], values[-1][0], name, style["color"]))
        numbers += [[*key, t, *value] for t, value in zip(turns, values, strict=True)]
    last = max(end[0] for end in ends)
    if (chance := below[0]["chance"]) is not None:
        ax.plot([1, last], [chance, chance], color="#333333", linestyle=":", linewidth=1.3)
        ends.append((last, chance, "chance", "#333333"))
    ax.set_xticks(range(1, last + 1))
    ax.set_xlim(0.85, last + (last - 0.85) * 0.62)
    label(ax, ends, last + (last - 0.85) * 0.07, "left")
    return save(figure, path, ("policy", "scope", "turn", "accuracy", "low", "high"), numbers)


def depth_curve(depths: Sequence[Row], path: Path, task: str, *, budget: str, protocol: str) -> Path:
    """Accuracy by the place of the evidence in the context at one budget, from rows of `by_depth`."""
    return _by_place(depths, path, (task, budget, protocol), "depth")


def distance_curve(distances: Sequence[Row], path: Path, task: str, *, budget: str, protocol: str) -> Path:
    """Accuracy by how far the evidence lies before the end of its context at one budget, from rows of `by_distance`."""
    return _by_place(distances, path, (task, budget, protocol), "distance")


def _by_place(found: Sequence[Row], path: Path, wanted: tuple[str, str, str], by: str) -> Path:
    """A line per policy, and the full cache's; `by` names the column that runs along the axis."""
    cell, (task, budget, protocol) = ("task", "budget", "protocol"), wanted
    rows = chosen((r for r in found if tuple(r[k] for k in cell) == wanted), f"{by} of {task!r}")
    whole = [r for r in found if (r["task"], r["policy"], r["protocol"]) == (task, "full", protocol)]
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["policy"], row["scope"]), []).append(row)
    lines = dict(sorted(lines.items(), key=lambda item: (not learned(item[1][0]), item[0])))
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    ax, ends, factor = figure.subplots(), [], 100 if by == "depth" else 1
    named = {
        "depth": "place of the evidence in the context (%)",
        "distance": "positions from the evidence to the end of its context",
    }
    frame(ax, f"{task}, budget {budget}", named[by], "accuracy")
    plain = {"color": "#333333", "linestyle": "--", "linewidth": 1.4, "marker": ".", "zorder": 2}
    for key, line in [*lines.items(), *([(("full", ""), whole)] if whole else [])]:
        style, name = (plain, "full cache") if key[0] == "full" else (style_of(lines, key), name_of(lines, key))
        draw(ax, [factor * r[by] for r in line], [(r["accuracy"], r["low"], r["high"]) for r in line], style)
        ends.append((factor * line[-1][by], line[-1]["accuracy"], name, style["color"]))
    if by == "depth":
        ax.set_xlim(0, 160)
        ax.set_xticks(range(0, 101, 20))
        label(ax, ends, 105, "left")
    else:
        ticks = sorted({row[by] for row in [*rows, *whole]})
        doubling_axis(ax, ticks, [str(tick) for tick in ticks], "left")
        label(ax, ends, ticks[-1] * 1.25, "left")
    keys = ("policy", "scope", by, "accuracy", "low", "high", "n", "n_contexts")
    return save(figure, path, keys, ([row[k] for k in keys] for row in [*rows, *whole]))
