"""The one style of all pictures: colours that colour-blind readers tell apart, a marker per policy, names at the lines.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), the light ones darkened to be read as text.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from retention.evaluation.equality import shown

Row = dict[str, Any]
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#B07500", "#3A9BDC", "#332288", "#6B6B00")
MARKERS = "osD^vPX<>h"
LABEL_SHARE = 0.42


def save(figure: Figure, path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> Path:
    """Write the figure as the named PNG and, beside it, as SVG for print, and its numbers."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    figure.savefig(path, dpi=150, facecolor="white")
    figure.set_layout_engine("none")  # it is laid out by now; once more would take as long as drawing it
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(path.with_suffix(".svg"), facecolor="white", metadata={"Date": None})
    return path


def chosen(rows: Iterable[Row], what: str) -> list[Row]:
    """The rows as a list.

    Raises:
        ValueError: where there are none, naming what they were asked for.
    """
    found = list(rows)
    if not found:
        raise ValueError(f"expected summary rows for {what}, got none; check the names")
    return found


def learned(row: Row) -> bool:
    """Whether trained gates take part in a row."""
    return bool(row.get("seed_accuracy") or row.get("learned"))


def lines_of(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows below the full cache by (policy, scope), learned policies first, widest budget last."""
    below = [row for row in rows if row["policy"] != "full"]
    below.sort(key=lambda r: (not learned(r), r["policy"], r["scope"], r["budget_fraction"]))
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in below:
        lines.setdefault((row["policy"], row["scope"]), []).append(row)
    return lines


def style_of(lines: Mapping[tuple[str, str], list[Row]], key: tuple[str, str]) -> Row:
    """Colour and marker by policy, line by scope; heavy for a learned global policy."""
    policies = list(dict.fromkeys(policy for policy, _ in lines))
    place = policies.index(key[0])
    heavy = learned(lines[key][0]) and key[1] == "global"
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": "-" if key[1] == "global" else (0, (4, 1.5)),
        "linewidth": 2.8 if heavy else 1.4,
        "markersize": 7.5 if heavy else 5.5,
        "zorder": 5 if heavy else 3,
    }


def name_of(lines: Mapping[tuple[str, str], list[Row]], key: tuple[str, str]) -> str:
    """A line's name: its policy, and its scope where the policy has both."""
    scopes = [scope for policy, scope in lines if policy == key[0]]
    return shown(key[0]) if len(scopes) == 1 else f"{shown(key[0])}, {key[1].replace('_', ' ')}"


def frame(ax: Axes, title: str, x: str, y: str) -> None:
    """Title, axes' names, quiet grid; accuracy from 0 to 1."""
    ax.set_title(title, fontsize=12, loc="left", fontweight="bold")
    ax.set_xlabel(x, fontsize=11)
    ax.set_ylabel(y, fontsize=11)
    if y == "accuracy":
        ax.set_ylim(-0.04, 1.06)
    ax.tick_params(labelsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    ax.set_axisbelow(True)


def label(ax: Axes, ends: Iterable[tuple], x: float, side: str) -> None:
    """Name each line (x, y, name, colour) in a column at x, spread so that no two names touch."""
    gap = 0.058
    ordered = sorted((end for end in ends if end[1] is not None), key=lambda end: end[1])
    ys = np.array([(ax.transScale + ax.transLimits).transform(end[:2])[1] for end in ordered], dtype=float)
    for _ in range(300):
        push = np.clip(gap - np.diff(ys), 0, None) / 2
        ys[:-1] -= push
        ys[1:] += push
        ys = np.clip(ys, gap / 2, 1 - gap / 2)
    touch = (1.0 if side == "right" else 0.0, 0.5)
    arrow = {"arrowstyle": "-", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3, "relpos": touch}
    text: Row = {"fontsize": 9.5, "ha": side, "va": "center", "zorder": 6, "textcoords": ax.get_xaxis_transform()}
    for (end_x, end_y, name, colour), y in zip(ordered, ys, strict=True):
        leader = arrow | {"color": colour}
        ax.annotate(name, (end_x, end_y), (x, y), color=colour, arrowprops=leader, **text)


def draw(ax: Axes, xs: Sequence[float], values: Sequence[tuple], style: Row) -> None:
    """One line with its band; values are (y, low, high), None where missing."""
    y, low, high = np.array(values, dtype=float).T
    ax.plot(xs, y, markeredgecolor="white", markeredgewidth=0.6, **style)
    alpha = 0.2 if style["linewidth"] > 2 else 0.08
    ax.fill_between(xs, low, high, color=style["color"], alpha=alpha, linewidth=0)


def named_side(ends: Sequence[tuple[float | None, float | None]]) -> tuple[int, str]:
    """Which end of the lines (y at the first x, y at the last) names stand at, the one that spreads, and their side."""
    if not ends:
        return -1, "left"
    tight, wide = (np.std([y for y in end if y is not None] or [0.0]) for end in zip(*ends, strict=True))
    return (0, "right") if tight > 1.5 * wide else (-1, "left")


def doubling_axis(ax: Axes, ticks: Sequence[float], names: Sequence[str], side: str) -> None:
    """A log axis, with room for names whose given side touches the lines."""
    room = 2 ** (LABEL_SHARE * (1 + np.log2(ticks[-1] / ticks[0])))
    left, right = (room, 1.12) if side == "right" else (1.12, room)
    ax.set_xscale("log", base=2)
    ax.set_xlim(ticks[0] / left, ticks[-1] * right)
    ax.set_xticks(ticks, list(names))
    ax.xaxis.set_minor_locator(NullLocator())
