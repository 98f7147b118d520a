"""What arms cost: bytes by item of the ledger, time over the length of the context, full attention that eviction misses."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from retention.cache.ledger import ITEMS
from retention.evaluation.drawing import (
    COLOURS,
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
from retention.evaluation.equality import shown

Arm = tuple[str, str]
MIB = 2**20


def _arms(rows: Iterable[Row], name: str) -> dict[Arm, list[Row]]:
    """Rows that hold `name`, by policy and scope, the full cache first.

    Raises:
        ValueError: where there are none.
    """
    told = chosen((r for r in rows if r["error"] is None and r.get(name) is not None), f"answers with {name!r}")
    found: dict[Arm, list[Row]] = defaultdict(list)
    for row in sorted(told, key=lambda r: (r["policy"] != "full", r["seed_train"] is None, r["policy"], r["scope"])):
        found[row["policy"], row["scope"]].append(row)
    return found


def _name(arms: Iterable[Arm], arm: Arm) -> str:
    """As `name_of`, with the full cache by its own."""
    if arm[0] == "full":
        return "full cache"
    scopes = [scope for policy, scope in arms if policy == arm[0]]
    return shown(arm[0]) if len(scopes) == 1 else f"{shown(arm[0])}, {arm[1].replace('_', ' ')}"


def byte_bars(rows: Sequence[Row], path: Path) -> Path:
    """Physical bytes per context after eviction, by item of the ledger, and the peak as a mark; rows of one budget and task."""
    arms = {arm: own for arm, own in _arms(rows, "bytes").items() if all("items" in row["bytes"] for row in own)}
    figure = Figure(figsize=(8.4, 1.6 + 0.34 * len(arms)), layout="constrained")
    ax, numbers = figure.subplots(), []
    frame(ax, "bytes per context", "MiB, physical: bars after eviction, marks at the peak", "")
    begins = np.zeros(len(arms))
    for place, item in enumerate(ITEMS):
        sizes = np.array([np.mean([row["bytes"]["items"].get(item, 0) for row in own]) for own in arms.values()]) / MIB
        if sizes.any():
            ax.barh(range(len(arms)), sizes, left=begins, color=COLOURS[place % len(COLOURS)], label=item)
        begins += sizes
        numbers += [[*arm, item, float(size * MIB)] for arm, size in zip(arms, sizes, strict=True)]
    peaks = [float(np.mean([row["bytes"]["peak"] for row in own])) for own in arms.values()]
    ax.plot(
        np.array(peaks) / MIB, range(len(arms)), "|", color="#333333", markersize=14, markeredgewidth=2, label="peak"
    )
    numbers += [[*arm, "peak", peak] for arm, peak in zip(arms, peaks, strict=True)]
    ax.set_yticks(range(len(arms)), [_name(arms, arm) for arm in arms])
    ax.invert_yaxis()
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return save(figure, path, ("policy", "scope", "item", "bytes"), numbers)


def missing_boxes(rows: Sequence[Row], path: Path) -> Path:
    """Missing mass by layer, a box per policy over the answers; rows of one budget and task."""
    arms = {arm: own for arm, own in _arms(rows, "missing_mass").items() if arm[0] != "full"}
    layers = max(len(row["missing_mass"]["by_layer"]) for own in arms.values() for row in own)
    figure = Figure(figsize=(max(7.6, 0.24 * layers * len(arms)), 4.6), layout="constrained")
    ax, numbers, width = figure.subplots(), [], 0.8 / len(arms)
    frame(ax, "missing mass", "layer", "full attention on what was evicted")
    for place, (arm, own) in enumerate(arms.items()):
        values = np.array([row["missing_mass"]["by_layer"] for row in own])
        at, colour = np.arange(layers) + (place + 0.5) * width - 0.4, COLOURS[place % len(COLOURS)]
        drawn = ax.boxplot(
            values, positions=at, widths=0.85 * width, patch_artist=True, showfliers=False, manage_ticks=False
        )
        for box in drawn["boxes"]:
            box.set(facecolor=colour, alpha=0.7)
        for median in drawn["medians"]:
            median.set(color="#222222")
        ax.plot([], [], "s", color=colour, label=_name(arms, arm))
        ends = np.quantile(values, [0, 0.25, 0.5, 0.75, 1], axis=0).T
        numbers += [[*arm, layer, *map(float, end)] for layer, end in enumerate(ends)]
    ax.set_xticks(range(layers))
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return save(figure, path, ("policy", "scope", "layer", "low", "q25", "median", "q75", "high"), numbers)


def latency_curve(rows: Sequence[Row], path: Path, *, part: str = "decode_per_token") -> Path:
    """Milliseconds per token over the length of the context in octaves, median and quartiles; rows of one budget.

    `part` is of a row's `ms`. Times as they came, in the run's batches: an impression; claims about speed are measured apart.
    """
    arms = _arms(rows, "ms")
    cells: dict[Arm, dict[int, list[float]]] = {arm: defaultdict(list) for arm in arms}
    for arm, own in arms.items():
        for row in own:
            cells[arm][2 ** int(np.log2(max(1, row["seen"])))].append(row["ms"][part])
    lines = lines_of(
        {**own[0], "budget_fraction": 0.0, "learned": own[0]["seed_train"] is not None} for own in arms.values()
    )
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    ax, ends, numbers = figure.subplots(), [], []
    frame(ax, part.replace("_", " "), "tokens of the context", "milliseconds")
    plain = {"color": "#333333", "linestyle": "--", "linewidth": 1.4, "marker": ".", "zorder": 2}
    for arm, found in cells.items():
        style, name = (plain, "full cache") if arm[0] == "full" else (style_of(lines, arm), name_of(lines, arm))
        xs = sorted(found)
        values = [tuple(float(x) for x in np.quantile(found[at], (0.5, 0.25, 0.75))) for at in xs]
        draw(ax, xs, values, style)
        ends.append((xs[-1], values[-1][0], name, style["color"]))
        numbers += [[*arm, at, *value, len(found[at])] for at, value in zip(xs, values, strict=True)]
    ticks = sorted({at for found in cells.values() for at in found})
    doubling_axis(ax, ticks, [str(tick) for tick in ticks], "left")
    label(ax, ends, ticks[-1] * 1.25, "left")
    return save(figure, path, ("policy", "scope", "tokens", "median", "q25", "q75", "n"), numbers)
