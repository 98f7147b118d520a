"""The page of `inspect_gates.py`: heat maps, a histogram and tables, nothing outside the file."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray
from PIL import Image

from retention.evaluation.browser import data_uri, image_of, mask_of, pieces
from retention.evaluation.drawing import COLOURS, frame
from retention.evaluation.kept_images import drawable
from retention.evaluation.looks import KINDS
from retention.evaluation.page import template
from retention.evaluation.report import flat
from retention.files import write_text

HATCHES = ("", "///")


def write_page(out: Path, found: Any, *, notes: list[str], card: dict[str, Any], title: str, **told: Any) -> Path:
    """Draw, fill the template, write."""
    from inspect_gates import SHARE

    context, cells = found.context, found.values.shape[0] * found.values.shape[1]
    held = found.kept.sum((0, 1))
    shown = range(len(context.images)) if drawable(context) else ()
    text = template("gates.html.j2").render(
        **{"title": title, "notes": notes, "value": found.value, "share": SHARE, "artefact": list(flat(card)), **told},
        pictures=[heat(found), histogram(found), places(found)],
        masks=[mask_of(np.sqrt(context.laid(held, i) / cells)) for i in shown],
        context={
            "images": [image_of(context, i) for i in range(len(context.images))],
            "prompt": list(pieces(context, held / cells)),
        },
    )
    write_text(out, text)
    return out


def picture(figure: Figure, name: str, caption: str) -> dict[str, Any]:
    """A figure inside the page."""
    held = io.BytesIO()
    figure.savefig(held, dpi=150, facecolor="white", format="png")
    drawn = Image.open(held)
    return {"name": name, "caption": caption, "uri": data_uri(drawn), "width": round(drawn.width / 1.5)}


def heat(found: Any) -> dict[str, Any]:
    """Quartiles of the values by layer and head, and how much of what is kept is a window or sinks."""
    layers, heads = found.values.shape[:2]
    decays = found.value.startswith("half-life")
    size = (5 * max(2.1, min(0.42 * heads, 4.0)) + 2.4, max(2.6, min(0.34 * layers, 6.0)) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, 5)
    quartiles = np.quantile(found.values, (0.25, 0.5, 0.75), axis=-1)
    norm = LogNorm(max(1e-3, quartiles.min()), max(2e-3, quartiles.max())) if decays else None
    figure.get_layout_engine().set(wspace=0.04)
    for ax, values, name in zip(axes[:3], quartiles, ("quarter", "median", "three quarters"), strict=True):
        drawn = ax.imshow(values, norm=norm, cmap="viridis", aspect="auto")
        _cells(ax, values, name, lambda x: f"{x:.2g}" if x < 1000 else f"{x:.0e}".replace("e+0", "e"))
    bar = figure.colorbar(drawn, ax=list(axes[:3]), fraction=0.03)
    bar.set_label(found.value, fontsize=10)
    if decays:  # labels at 1, 2 and 5 of every power of ten, in digits
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    kept = found.kept.sum(-1)
    parts = (found.kept[..., found.newest()].sum(-1) / kept, found.kept[..., :4].mean(-1))
    for ax, values, name in zip(axes[3:], parts, ("newest 10%", "first 4 kept"), strict=True):
        drawn = ax.imshow(values, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        _cells(ax, values, name, lambda x: f"{100 * x:.0f}")
    bar = figure.colorbar(drawn, ax=list(axes[3:]), fraction=0.045)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    caption = (
        f"Left: quartiles of the {found.value} over all tokens, by layer and head. Right: which part of what a head keeps are the newest "
        "tokens (a window), and which part of the first four it keeps (sinks)."
    )
    return picture(figure, "half-lives by layer and head", caption)


def _cells(ax: Axes, values: NDArray, name: str, text: Any) -> None:
    frame(ax, name, "head", "layer")
    ax.grid(visible=False)
    ax.set_xticks(range(0, values.shape[1], 1 + values.shape[1] // 12))
    ax.set_yticks(range(0, values.shape[0], 1 + values.shape[0] // 12))
    shade = ax.images[0]
    for (layer, head), value in np.ndenumerate(values) if values.size <= 80 else ():
        bright = float(shade.norm(value)) > 0.55
        ax.text(head, layer, text(value), ha="center", va="center", fontsize=8, color="black" if bright else "white")


def histogram(found: Any) -> dict[str, Any]:
    """All values by modality."""
    figure = Figure(figsize=(7.6, 3.8), layout="constrained")
    ax = figure.subplots()
    decays = found.value.startswith("half-life")
    values = np.log2(np.maximum(found.values, 1)) if decays else found.values
    edges = (
        np.arange(0, min(21, np.ceil(values.max())) + 1.01) if decays else np.linspace(values.min(), values.max(), 30)
    )
    kinds = [kind for kind in range(2) if (found.context.visual == bool(kind)).any()]
    frame(ax, "", found.value, "share of a modality's tokens (%)")
    for i, kind in enumerate(kinds):
        own = values[..., found.context.visual == bool(kind)].ravel()
        counts = np.histogram(np.clip(own, edges[0], edges[-1]), edges)[0]
        step, wide = edges[1] - edges[0], 0.8 * (edges[1] - edges[0]) / len(kinds)
        style = {"color": COLOURS[1 - i], "hatch": HATCHES[i], "edgecolor": "white", "label": KINDS[kind]}
        ax.bar(edges[:-1] + step * 0.1 + wide * (i + 0.5), 100 * counts / own.size, wide, **style)
    if decays:
        ax.set_xticks(edges[:: 1 + len(edges) // 12], [f"{2**e:,.0f}" for e in edges[:: 1 + len(edges) // 12]])
    ax.set_yscale("log")
    ax.set_ylim(None, 150)
    ax.legend(frameon=False)
    return picture(
        figure,
        "histogram",
        f"The {found.value} of all tokens in all layers and heads, text and images apart; a log axis.",
    )


def places(found: Any) -> dict[str, Any]:
    """Kept share by place in the input."""
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    ax = figure.subplots()
    part = np.arange(found.length) * 40 // found.length
    known = np.unique(part)
    share = [100 * found.kept[..., part == p].mean() for p in known]
    frame(ax, "", "place in the input (%)", "kept (% of entries)")
    ax.plot(100 * (known + 0.5) / 40, share, marker="o", color=COLOURS[1], markersize=4)
    ax.set_ylim(0, None)
    return picture(
        figure,
        "places",
        "What the gates keep of each part of the input with a tenth of every head: sinks left, the window right.",
    )
