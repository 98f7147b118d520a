"""Pictures of an evaluation, each with a CSV of its numbers beside it."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

Row = dict[str, Any]
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#B07500", "#3A9BDC", "#332288", "#6B6B00")
MARKERS = "osD^vPX<>h"
TURNS_APART = 0.05
LABEL_SHARE = 0.42
VEIL = LinearSegmentedColormap.from_list("veil", ["#30343c", "#ffffff"])


def _save(figure: Figure, path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> Path:
    """Write the figure and, beside it, its numbers."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def _chosen(rows: Iterable[Row], what: str) -> list[Row]:
    found = list(rows)
    if not found:
        raise ValueError(f"expected summary rows for {what}, got none; check the names")
    return found


def _lines(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows below the full cache by (policy, scope), learned policies first, widest budget last."""
    below = [row for row in rows if row["policy"] != "full"]
    below.sort(key=lambda r: (not r["seed_accuracy"], r["policy"], r["scope"], r["budget_fraction"]))
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in below:
        lines.setdefault((row["policy"], row["scope"]), []).append(row)
    return lines


def _style(lines: Mapping[tuple[str, str], list[Row]], key: tuple[str, str]) -> Row:
    """Colour and marker by policy, line by scope; heavy for a learned global policy."""
    policies = list(dict.fromkeys(policy for policy, _ in lines))
    place = policies.index(key[0])
    heavy = bool(lines[key][0]["seed_accuracy"]) and key[1] == "global"
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": "-" if key[1] == "global" else (0, (4, 1.5)),
        "linewidth": 2.8 if heavy else 1.4,
        "markersize": 7.5 if heavy else 5.5,
        "zorder": 5 if heavy else 3,
    }


def _name(lines: Mapping[tuple[str, str], list[Row]], key: tuple[str, str]) -> str:
    scopes = [scope for policy, scope in lines if policy == key[0]]
    return key[0] if len(scopes) == 1 else f"{key[0]}, {key[1].replace('_', ' ')}"


def _frame(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=12, loc="left", fontweight="bold")
    ax.set_xlabel(x, fontsize=11)
    ax.set_ylabel(y, fontsize=11)
    if y == "accuracy":
        ax.set_ylim(-0.04, 1.06)
    ax.tick_params(labelsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    ax.set_axisbelow(True)


def _label(ax: Axes, ends: Iterable[tuple], x: float, side: str) -> None:
    """Name each line (x, y, name, colour) in a column at x, spread so that no two names touch."""
    low, high = ax.get_ylim()
    gap = 0.058 * (high - low)
    ordered = sorted((end for end in ends if end[1] is not None), key=lambda end: end[1])
    ys = np.array([end[1] for end in ordered], dtype=float)
    for _ in range(300):
        push = np.clip(gap - np.diff(ys), 0, None) / 2
        ys[:-1] -= push
        ys[1:] += push
        ys = np.clip(ys, low + gap / 2, high - gap / 2)
    touch = (1.0 if side == "right" else 0.0, 0.5)
    arrow = {"arrowstyle": "-", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3, "relpos": touch}
    text: Row = {"fontsize": 9.5, "ha": side, "va": "center", "zorder": 6}
    for (end_x, end_y, name, colour), y in zip(ordered, ys, strict=True):
        leader = arrow | {"color": colour}
        ax.annotate(name, (end_x, end_y), (x, y), color=colour, arrowprops=leader, **text)


def _turns(row: Row, turns: str) -> tuple[float | None, float | None, float | None]:
    """Accuracy with its bounds on the named turns."""
    if turns == "first turn":
        return row["accuracy_first_turn"], row["by_turn_low"][0], row["by_turn_high"][0]
    if turns == "later turns":
        return row["accuracy_later_turns"], row["later_turns_low"], row["later_turns_high"]
    return row["accuracy"], row["ci_low"], row["ci_high"]


def _kept(row: Row) -> float:
    return row["kept_fraction"] or row["budget_fraction"]


def _draw(ax: Axes, xs: Sequence[float], values: Sequence[tuple], style: Row) -> None:
    """One line with its band; values are (y, low, high), None where missing."""
    y, low, high = np.array(values, dtype=float).T
    ax.plot(xs, y, markeredgecolor="white", markeredgewidth=0.6, **style)
    alpha = 0.2 if style["linewidth"] > 2 else 0.08
    ax.fill_between(xs, low, high, color=style["color"], alpha=alpha, linewidth=0)


def _curves(ax: Axes, rows: list[Row], everywhere: Mapping, turns: str) -> list[list]:
    """Accuracy over what is kept, for one task; gives the numbers drawn."""
    ends, numbers, lines = [], [], _lines(rows)
    outer = [[_turns(line[i], turns)[0] for i in (0, -1)] for line in lines.values()]
    tight, wide = np.nanstd(np.array(outer, dtype=float), axis=0)
    at, side = (0, "right") if tight > 1.5 * wide else (-1, "left")
    for key, line in lines.items():
        values, style = [_turns(row, turns) for row in line], _style(everywhere, key)
        _draw(ax, [_kept(row) for row in line], values, style)
        ends.append((_kept(line[at]), values[at][0], _name(everywhere, key), style["color"]))
        numbers += [[turns, *key, _kept(r), *v] for r, v in zip(line, values, strict=True)]
    named = {row["budget"]: row["budget_fraction"] for line in lines.values() for row in line}
    ticks = sorted(named.values())
    _budget_axis(ax, ticks, side)
    whole = [_turns(row, turns)[0] for row in rows if row["policy"] == "full"]
    full, chance = whole[0] if whole else rows[0]["full_accuracy"], rows[0]["chance"]
    for y, name, dash in ((full, "full cache", "--"), (chance, "chance", ":")):
        if y is not None:
            span = [ticks[0], ticks[-1]]
            ax.plot(span, [y, y], color="#333333", linestyle=dash, linewidth=1.3, zorder=2)
            ends.append((ticks[at], y, name, "#333333"))
    _label(ax, ends, ticks[at] * (0.8 if at == 0 else 1.25), side)
    return numbers


def _budget_axis(ax: Axes, ticks: Sequence[float], side: str) -> None:
    """Budgets on a log axis, with room for names whose given side touches the lines."""
    room = 2 ** (LABEL_SHARE * (1 + np.log2(ticks[-1] / ticks[0])))
    left, right = (room, 1.12) if side == "right" else (1.12, room)
    ax.set_xscale("log", base=2)
    ax.set_xlim(ticks[0] / left, ticks[-1] * right)
    ax.set_xticks(ticks, [f"{100 * tick:.3g}%" for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())


def accuracy_curves(summary: Sequence[Row], path: Path, *, protocol: str | None = None) -> Path:
    """Accuracy over the kept part of the cache, a panel per task, for one protocol."""
    protocol = protocol or _chosen(summary, "any protocol")[0]["protocol"]
    rows = _chosen((r for r in summary if r["protocol"] == protocol), f"protocol {protocol!r}")
    lines, tasks = _lines(rows), list(dict.fromkeys(row["task"] for row in rows))
    turned = [r for r in rows if None not in (r["accuracy_later_turns"], r["accuracy_first_turn"])]
    gaps = [abs(r["accuracy_first_turn"] - r["accuracy_later_turns"]) for r in turned]
    split = ("first turn", "later turns") if max(gaps, default=0) > TURNS_APART else ("all turns",)
    figure = Figure(figsize=(5.8 * len(tasks), 4.4 * len(split)), layout="constrained")
    axes = figure.subplots(len(split), len(tasks), squeeze=False)
    numbers = []
    for (i, turns), (j, task) in product(enumerate(split), enumerate(tasks)):
        _frame(axes[i, j], f"{task}, {turns}", "kept part of the cache", "accuracy")
        mine = [row for row in rows if row["task"] == task]
        numbers += [[task, *line] for line in _curves(axes[i, j], mine, lines, turns)]
    header = ("task", "turns", "policy", "scope", "kept_fraction", "accuracy", "low", "high")
    return _save(figure, path, header, numbers)


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
    below = _chosen((r for r in rows if r["policy"] != "full"), f"task {task!r} of several turns")
    budget = budget or min(below, key=lambda row: row["budget_fraction"])["budget"]
    below = [r for r in below if r["budget"] == budget and r["policy"] in (policies or r["policy"])]
    whole = [row for row in rows if row["policy"] == "full"][:1]
    lines = _lines(_with_protocol(_chosen(below, f"budget {budget!r} and policies {policies}")))
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    ax, ends, numbers = figure.subplots(), [], []
    _frame(ax, f"{task}, budget {budget}", "turn", "accuracy")
    plain = {"color": "#333333", "linestyle": "--", "linewidth": 1.4, "marker": ".", "zorder": 2}
    for key, (row, *_) in [*lines.items(), *((("full cache", ""), [row]) for row in whole)]:
        style = plain if row["policy"] == "full" else _style(lines, key)
        bounds = (row["accuracy_by_turn"], row["by_turn_low"], row["by_turn_high"])
        values = list(zip(*bounds, strict=True))
        turns = range(1, len(values) + 1)
        _draw(ax, turns, values, style)
        name = "full cache" if row["policy"] == "full" else _name(lines, key)
        ends.append((turns[-1], values[-1][0], name, style["color"]))
        numbers += [[*key, t, *value] for t, value in zip(turns, values, strict=True)]
    last = max(end[0] for end in ends)
    if (chance := below[0]["chance"]) is not None:
        ax.plot([1, last], [chance, chance], color="#333333", linestyle=":", linewidth=1.3)
        ends.append((last, chance, "chance", "#333333"))
    ax.set_xticks(range(1, last + 1))
    ax.set_xlim(0.85, last + (last - 0.85) * 0.62)
    _label(ax, ends, last + (last - 0.85) * 0.07, "left")
    return _save(figure, path, ("policy", "scope", "turn", "accuracy", "low", "high"), numbers)


def _cells(ax: Axes, values: NDArray, top: float) -> None:
    """Print each value [layers, heads] in its cell, where the cells are few enough to read."""
    if values.size > 80:
        return
    for (layer, head), value in np.ndenumerate(values):
        colour = "white" if value < 0.6 * top else "black"
        text = f"{100 * value:.0f}"
        ax.text(head, layer, text, ha="center", va="center", color=colour, fontsize=9)


def survival_heatmap(survival: Mapping[str, NDArray], path: Path) -> Path:
    """Kept fraction by layer and head, a panel per name of survival; each is [layers, heads]."""
    named = {name: np.asarray(values, dtype=float) for name, values in survival.items()}
    if not named or any(values.ndim != 2 for values in named.values()):
        raise ValueError("expected arrays [layers, heads] by name, got none or another shape")
    columns = min(4, len(named))
    layers, heads = np.max([values.shape for values in named.values()], axis=0)
    size = (columns * max(2.6, 0.42 * heads) + 1.2, max(2.4, min(0.34 * layers, 5.5) + 1.0))
    rows = -(-len(named) // columns)
    figure = Figure(figsize=(size[0], size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    top = max(float(values.max()) for values in named.values()) or 1.0
    for ax, (name, values) in zip(axes, named.items(), strict=False):
        image = ax.imshow(values, vmin=0, vmax=top, cmap="viridis", aspect="auto")
        _frame(ax, name, "head", "layer")
        ax.grid(visible=False)
        ax.set_xticks(range(0, values.shape[1], 1 + values.shape[1] // 12))
        ax.set_yticks(range(0, values.shape[0], 1 + values.shape[0] // 12))
        _cells(ax, values, top)
    for ax in axes[len(named) :]:
        ax.set_axis_off()
    bar = figure.colorbar(image, ax=list(axes), aspect=22 * rows, fraction=0.03)
    bar.set_label("kept part (%)", fontsize=11)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    numbers = ([name, *at, v] for name, values in named.items() for at, v in np.ndenumerate(values))
    return _save(figure, path, ("name", "layer", "head", "kept_fraction"), numbers)


def _clearness(life: NDArray) -> tuple[float, float, NDArray]:
    """The shortest and longest finite life, and where each life lies between them on a log axis."""
    ends = life[np.isfinite(life)]
    low = max(1.0, float(ends.min())) if ends.size else 1.0
    high = max(2 * low, float(ends.max(initial=low)))
    return low, high, np.log(np.clip(life, low, high) / low) / np.log(high / low)


def _veiled(image: NDArray[np.uint8], clear: NDArray) -> NDArray:
    """The image [height, width, 3] with each patch as visible as clear [rows, cols] in [0, 1]."""
    down, across = (np.arange(image.shape[i]) * clear.shape[i] // image.shape[i] for i in (0, 1))
    share = 0.08 + 0.92 * clear[down][:, across, None]
    veil = 255 * np.array(VEIL(0.0)[:3])
    return (image * share + veil * (1 - share)).round().astype(np.uint8)


def _outline(ax: Axes, evidence: NDArray, height: float, width: float) -> None:
    """A frame around each marked patch of evidence [rows, cols], a patch being height x width."""
    for row, col in np.argwhere(evidence):
        for colour, line in (("black", 2.8), ("#FFD400", 1.5)):
            at = (col * width - 0.5, row * height - 0.5)
            frame = Rectangle(at, width, height, fill=False, edgecolor=colour, linewidth=line)
            frame.set_clip_on(False)
            ax.add_patch(frame)


def patch_strip(
    images: NDArray[np.uint8],
    life: NDArray,
    path: Path,
    *,
    label: str = "life of a patch (tokens)",
    evidence: NDArray[np.bool_] | None = None,
) -> Path:
    """Images above, and below the same with each patch veiled the more the shorter it lives.

    Args:
        images: [n, height, width, 3], at most 16.
        life: in tokens, [n, rows, cols]; endless lives count as the longest that ends.
        path: where the picture goes.
        label: of the colour bar.
        evidence: patches to outline, [n, rows, cols].
    """
    if images.ndim != 4 or life.ndim != 3 or not 1 <= len(images) == len(life) <= 16:
        got = f"got {images.shape} and {life.shape}"
        raise ValueError(f"expected 1 to 16 images and as many lives, {got}; pass fewer images")
    low, high, clear = _clearness(life)
    columns, bands = min(8, len(images)), -(-len(images) // 8)
    size = (1.35 * columns + 1.3, 2.75 * bands + 0.2)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(2 * bands, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for i, image in enumerate(images):
        upper, lower = axes[2 * (i // 8), i % 8], axes[2 * (i // 8) + 1, i % 8]
        upper.set_title(f"image {i + 1}", fontsize=10)
        upper.imshow(image, interpolation="nearest")
        lower.imshow(_veiled(image, clear[i]), interpolation="nearest")
        if evidence is not None:
            patch = np.array(image.shape[:2]) / evidence.shape[1:]
            _outline(upper, evidence[i], *patch)
            _outline(lower, evidence[i], *patch)
    scale = ScalarMappable(LogNorm(low, high), VEIL)
    bar = figure.colorbar(scale, ax=list(axes.flat), aspect=16 * bands, fraction=0.03)
    powers = np.arange(np.ceil(np.log2(low)), np.floor(np.log2(high)) + 1)
    bar.set_ticks(list(2.0**powers), labels=[f"{2 ** int(power):,}" for power in powers])
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_label(label, fontsize=11)
    header = ("image", "row", "col", "life", "evidence")
    marked = np.zeros(life.shape, bool) if evidence is None else evidence
    numbers = ([*at, value, int(marked[at])] for at, value in np.ndenumerate(life))
    return _save(figure, path, header, numbers)
