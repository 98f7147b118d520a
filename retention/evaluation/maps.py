"""What is kept where, drawn from a run's diagnostics: by layer and head, by place in the context, and how long tokens live."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from retention.evaluation.drawing import COLOURS, MARKERS, frame, label, save
from retention.evaluation.equality import shown
from retention.evaluation.looks import KINDS, Lives, Look

HATCHES = ("", "///")


def shares(looks: Sequence[Look]) -> dict[str, NDArray]:
    """Kept share [layers, heads] by policy."""
    return {shown(look.policy): look.kept.sum((2, 3)) / max(int(look.seen.sum()), 1) for look in looks}


def shares_by_kind(looks: Sequence[Look]) -> dict[str, NDArray]:
    """Kept share [layers, heads] by policy and modality, of the modalities that the contexts have."""
    return {
        f"{shown(look.policy)}, {name}": look.kept[..., kind].sum(2) / int(look.seen[:, kind].sum())
        for look in looks
        for kind, name in enumerate(KINDS)
        if look.seen[:, kind].any()
    }


def entries(looks: Sequence[Look]) -> dict[str, NDArray]:
    """Kept entries of a context [layers, heads] by policy, of looks that say how many contexts they are of."""
    return {shown(look.policy): look.kept.sum((2, 3)) / look.contexts for look in looks if look.contexts}


def _cells(ax: Axes, values: NDArray, top: float, scale: float) -> None:
    """Print each value [layers, heads] in its cell, where the cells are few enough to read."""
    if values.size > 80:
        return
    for (layer, head), value in np.ndenumerate(values):
        colour = "white" if value < 0.6 * top else "black"
        text = f"{scale * value:.0f}"
        ax.text(head, layer, text, ha="center", va="center", color=colour, fontsize=9)


def survival_heatmap(survival: Mapping[str, NDArray], path: Path) -> Path:
    """Kept fraction by layer and head, a panel per name of survival; each is [layers, heads]."""
    return _heatmap(survival, path, "kept_fraction", "kept part (%)", 100)


def allocation_heatmap(allocation: Mapping[str, NDArray], path: Path) -> Path:
    """Kept entries by layer and head, a panel per name of allocation; each is [layers, heads]."""
    return _heatmap(allocation, path, "entries", "entries per context", 1)


def _heatmap(found: Mapping[str, NDArray], path: Path, column: str, unit: str, scale: float) -> Path:
    """Arrays [layers, heads] side by side on one colour scale, their values times `scale` printed and at the bar.

    Raises:
        ValueError: for no arrays, or others.
    """
    named = {name: np.asarray(values, dtype=float) for name, values in found.items()}
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
        frame(ax, name, "head", "layer")
        ax.title.set_fontsize(min(12.0, 240 / len(name)))
        ax.grid(visible=False)
        ax.set_xticks(range(0, values.shape[1], 1 + values.shape[1] // 12))
        ax.set_yticks(range(0, values.shape[0], 1 + values.shape[0] // 12))
        _cells(ax, values, top, scale)
    for ax in axes[len(named) :]:
        ax.set_axis_off()
    bar = figure.colorbar(image, ax=list(axes), aspect=22 * rows, fraction=0.03)
    bar.set_label(unit, fontsize=11)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{scale * value:g}")
    numbers = ([name, *at, v] for name, values in named.items() for at, v in np.ndenumerate(values))
    return save(figure, path, ("name", "layer", "head", column), numbers)


def place_curve(looks: Sequence[Look], path: Path) -> Path:
    """Kept share, over all layers and heads, by place in the context; a panel per modality that the contexts have."""
    kinds = [kind for kind in range(2) if any(look.seen[:, kind].any() for look in looks)]
    figure = Figure(figsize=(6.4 * len(kinds), 4.2), layout="constrained")
    numbers = []
    for ax, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        frame(ax, KINDS[kind], "place in the context (%)", "kept (% of entries)")
        ends = []
        for i, look in enumerate(looks):
            seen, kept = look.seen[:, kind], look.kept[..., kind].sum((0, 1)) / look.cells
            share = np.divide(100 * kept, seen, out=np.full(len(seen), np.nan), where=seen > 0)
            middles = 100 * (np.arange(len(seen)) + 0.5) / len(seen)
            known = np.flatnonzero(seen)
            colour = COLOURS[i % len(COLOURS)]
            ax.plot(middles, share, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=4.5, linewidth=1.3)
            ends.append((middles[known[-1]], share[known[-1]], shown(look.policy), colour))
            numbers += [[KINDS[kind], look.policy, place, value] for place, value in zip(middles, share, strict=True)]
        ax.set_yscale("function", functions=(lambda y: np.sqrt(np.clip(y, 0, None)), np.square))
        ax.set_ylim(0, 105)
        ax.set_yticks((0, 1, 5, 10, 25, 50, 100))
        ax.set_xlim(0, 150)
        ax.set_xticks(range(0, 101, 20))
        label(ax, ends, 106, "left")
    return save(figure, path, ("modality", "policy", "place", "kept_percent"), numbers)


def half_life_histogram(lives: Lives, path: Path) -> Path:
    """How many tokens the gates let live how long, text and images apart, and the quartiles of every layer."""
    figure = Figure(figsize=(12.4, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts, bins = lives.counts, lives.counts.shape[-1]
    kinds = [kind for kind in range(2) if counts[:, :, kind].any()]
    frame(left, "all layers and heads", "half-life (tokens)", "share of tokens (%)")
    for i, kind in enumerate(kinds):
        own = counts[:, :, kind].sum((0, 1))
        wide = 0.8 / len(kinds)
        style = {"color": COLOURS[1 - i], "hatch": HATCHES[i], "edgecolor": "white", "label": KINDS[kind]}
        left.bar(np.arange(bins) + (i - (len(kinds) - 1) / 2) * wide, 100 * own / own.sum(), wide, **style)
    used = np.flatnonzero(counts.sum((0, 1, 2)))
    ticks = range(int(used[0]), int(used[-1]) + 1, 1 + len(used) // 10)
    names = [f"{2**tick:,}" for tick in ticks]
    left.set_yscale("log")
    left.set_ylim(None, 150)
    left.set_xticks(list(ticks), names, rotation=35)
    left.legend(frameon=False)
    frame(right, "by layer: median, quartiles, ends", "half-life (tokens)", "layer")
    for layer, own in enumerate(counts.sum((1, 2))):
        ends, quarter, middle, most, last = (_quantile(own, q) for q in (0.0, 0.25, 0.5, 0.75, 1.0))
        right.plot([ends, last], [layer, layer], color="#9a9a9a", linewidth=1.2)
        right.plot([quarter, most], [layer, layer], color=COLOURS[1], linewidth=5, solid_capstyle="butt")
        right.plot(middle, layer, "o", color="#111111", markersize=5)
    right.set_xticks(list(ticks), names, rotation=35)
    right.invert_yaxis()
    right.set_yticks(range(0, len(counts), 1 + len(counts) // 16))
    rows = ([*at[:2], KINDS[at[2]], 2 ** at[3], int(n)] for at, n in np.ndenumerate(counts) if n)
    return save(figure, path, ("layer", "head", "modality", "half_life_from", "tokens"), rows)


def _quantile(counts: NDArray, q: float) -> int:
    """The bin in which a quantile of counted values lies."""
    reached = np.cumsum(counts) >= max(1, q * counts.sum())
    return int(np.argmax(reached))
