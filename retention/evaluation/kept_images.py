"""The images of a context, each token as visible as the share of layers and heads that hold it, at every budget."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from retention.evaluation.drawing import save
from retention.evaluation.equality import shown
from retention.evaluation.looks import Look, Shown

VEIL = LinearSegmentedColormap.from_list("veil", ["#30343c", "#ffffff"])
COLUMNS = 8
"""Images in one picture at most."""


def clearness(context: Shown, held: NDArray, cells: int, image: int) -> NDArray:
    """How visible each token of an image is, [rows, columns] in [0, 1]; the square root, since budgets are small."""
    return np.sqrt(context.laid(held, image) / cells)


def drawable(context: Shown) -> bool:
    """Whether the places of a context's visual tokens are known."""
    return context.places is not None and bool(context.images)


def picked(context: Shown) -> list[int]:
    """Up to eight images, those with evidence first, in the order of the context."""
    assert context.places is not None
    marked = {int(context.places[place, 0]) for place in context.evidence()} - {-1}
    order = sorted(range(len(context.images)), key=lambda i: i not in marked)
    return sorted(order[:COLUMNS])


def kept_images(context: Shown, looks: Sequence[Look], path: Path, number: int = 0) -> Path:
    """Images above; below, a row per look (one policy's budgets), veiled where few (layer, head) hold a token.

    Tokens that a question asks about are outlined. `number` is the context's among those the looks counted.
    """
    if not drawable(context) or not looks:
        raise ValueError("expected a context with images whose tokens' places are known, and at least one look at it")
    images, marked, numbers = picked(context), _marked(context), []
    figure = Figure(figsize=(1.35 * len(images) + 2.6, 1.4 * (1 + len(looks)) + 0.3), layout="constrained")
    ax = figure.subplots()  # one for all: an axes per image would take seconds
    for column, image in enumerate(images):
        ax.text(column + 0.46, -0.06, f"image {image + 1}", ha="center", fontsize=10)
        _place(ax, context, image, context.images[image], (column, 0), marked)
        for row, look in enumerate(looks, start=1):
            clear = clearness(context, look.held[number], look.cells, image)
            _place(ax, context, image, veiled(context.images[image], clear), (column, row), marked)
            held = context.laid(look.held[number], image)
            numbers += [[look.policy, look.budget, image, *at, int(n), look.cells] for at, n in np.ndenumerate(held)]
    for row, look in enumerate(looks, start=1):
        ax.text(-0.08, row + 0.46, f"{shown(look.policy)}\n{look.budget}", ha="right", va="center", fontsize=10)
    ax.set(xlim=(-1.0, len(images)), ylim=(1 + len(looks), -0.2), aspect="equal")
    ax.set_axis_off()
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), VEIL), ax=ax, aspect=18, fraction=0.02)
    marks = (0, 0.01, 0.05, 0.2, 0.5, 1)
    bar.set_ticks([mark**0.5 for mark in marks], labels=[f"{100 * mark:g}%" for mark in marks])
    bar.set_label("share of layers and heads", fontsize=10)
    return save(figure, path, ("policy", "budget", "image", "row", "col", "held", "cells"), numbers)


def _place(
    ax: Axes, context: Shown, image: int, pixels: NDArray, at: tuple[int, int], marked: set[tuple[int, int, int]]
) -> None:
    """Draw an image in a cell of side 1 at (column, row), with frames around its marked tokens."""
    high, wide = 0.92 * np.array(pixels.shape[:2]) / max(pixels.shape[:2])
    left, top = at[0] + (0.92 - wide) / 2, at[1] + (0.92 - high) / 2
    ax.imshow(pixels, extent=(left, left + wide, top + high, top), interpolation="nearest")
    rows, columns = context.grid(image)
    for own, row, column in marked:
        for colour, line in (("black", 2.8), ("#FFD400", 1.5)) if own == image else ():
            corner = (left + column * wide / columns, top + row * high / rows)
            ax.add_patch(Rectangle(corner, wide / columns, high / rows, fill=False, edgecolor=colour, linewidth=line))


def _marked(context: Shown) -> set[tuple[int, int, int]]:
    assert context.places is not None
    return {tuple(map(int, context.places[place])) for place in context.evidence()}  # type: ignore[misc]


def veiled(image: NDArray[np.uint8], clear: NDArray) -> NDArray[np.uint8]:
    """The image [height, width, 3] with each patch as visible as clear [rows, columns] in [0, 1]."""
    down, across = (np.arange(image.shape[i]) * clear.shape[i] // image.shape[i] for i in (0, 1))
    share = 0.08 + 0.92 * clear[down][:, across, None]
    veil = 255 * np.array(VEIL(0.0)[:3])
    return (image * share + veil * (1 - share)).round().astype(np.uint8)
