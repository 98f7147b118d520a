"""The example browser of a report: contexts with their evidence, what every policy answered and what it kept of them."""

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from retention.evaluation.equality import shown
from retention.evaluation.kept_images import clearness, drawable
from retention.evaluation.looks import Look, Shown

Row = dict[str, Any]
LONGEST = 1200
"""Text tokens up to which a context is shown whole."""
EDGE, AROUND = 150, 60
"""Tokens shown of a longer one: at either end, and around evidence."""
SAID = 1500
"""Characters shown of an answer: of a long one its beginning and end."""
LEVELS = 4
VEIL = (48, 52, 60)


def data_uri(picture: Image.Image) -> str:
    """A picture inside the page itself."""
    held = io.BytesIO()
    picture.save(held, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode("ascii")


def browse(
    task: str, contexts: Sequence[Shown], rows: Sequence[Row], looks: Sequence[Look], protocol: str
) -> list[Row]:
    """What the template shows of each context: prompt, images, turns, and per budget all policies' answers and keeps."""
    mine = [row for row in rows if row["task"] == task and row["protocol"] == protocol]
    budgets = dict.fromkeys(row["budget"]["requested"] for row in mine if row["policy"] != "full")
    found = []
    for number, context in enumerate(contexts):
        own = [row for row in mine if row["example_id"] == context.id]
        found.append(
            {
                **{"task": task, "id": context.id, "turns": context.turns},
                "images": [image_of(context, i) for i in range(len(context.images))],
                "prompt": list(pieces(context)),
                "length": len(context.tokens),
                "evidence": len(context.evidence()),
                "budgets": [
                    {
                        "budget": budget,
                        "answers": _answers(own, budget),
                        "kept": list(_kept(context, looks, number, budget)),
                    }
                    for budget in budgets
                ],
            }
        )
    return found


def _answers(rows: Sequence[Row], budget: str) -> list[Row]:
    """Every policy's answers, turn by turn, the full cache's first; of several training seeds the first."""
    lines: dict[tuple[str, str], Row] = {}
    ordered = sorted(rows, key=lambda row: (row["policy"] != "full", row["seed_train"] is None))
    for row in ordered:
        if row["budget"]["requested"] == budget or row["policy"] == "full":
            name = "full cache" if row["policy"] == "full" else shown(row["policy"])
            line = lines.setdefault((row["policy"], row["scope"]), {"policy": name, "cells": {}})
            score = row["score"] if row.get("scored", True) else None
            line["cells"].setdefault(row["turn"], {"said": shortened(row["prediction"]), "score": score})
    return list(lines.values())


def shortened(text: str) -> str:
    """A text of which a page shows all, or the ends of a long one and how much lies between."""
    if len(text) <= SAID:
        return text
    return f"{text[: SAID // 2]} [... {len(text) - SAID} characters not shown ...] {text[-SAID // 2 :]}"


def _kept(context: Shown, looks: Sequence[Look], number: int, budget: str) -> Iterator[Row]:
    """What each policy kept of one context at one budget."""
    for look in looks:
        if look.budget == budget and number < len(look.held):
            held = look.held[number]
            masks = [
                mask_of(clearness(context, held, look.cells, i)) for i in range(len(context.images) * drawable(context))
            ]
            yield {
                "policy": shown(look.policy),
                "share": float(held.sum()) / (len(held) * look.cells),
                "anywhere": float((held > 0).mean()),
                "evidence": _recall(context, held),
                "masks": masks,
                "prompt": list(pieces(context, held / look.cells)),
            }


def _recall(context: Shown, held: NDArray) -> float | None:
    """Share of the evidence that any layer and head holds."""
    evidence = context.evidence()
    return float((held[evidence] > 0).mean()) if evidence else None


def image_of(context: Shown, number: int) -> Row:
    """One image with the cells that are asked about, in percent of its sides."""
    height, width = context.images[number].shape[:2]
    marks = []
    if drawable(context):
        assert context.places is not None
        rows, columns = context.grid(number)
        for own, row, column in context.places[context.evidence()].tolist():
            if own == number:
                marks.append((100 * column / columns, 100 * row / rows, 100 / columns, 100 / rows))
    uri = data_uri(Image.fromarray(context.images[number]))
    return {"uri": uri, "width": width, "height": height, "marks": marks}


def mask_of(clear: NDArray) -> str:
    """A dark veil, a pixel per token, the more opaque the fewer layers and heads hold it."""
    alpha = (235 * (1 - clear)).round().astype(np.uint8)
    veil = np.empty((*clear.shape, 4), np.uint8)
    veil[..., :3], veil[..., 3] = VEIL, alpha
    return data_uri(Image.fromarray(veil))


def pieces(context: Shown, share: NDArray | None = None) -> Iterator[Row]:
    """The prompt as stretches of text of one look, images in place, and gaps where a long context is cut.

    A stretch has whether it is evidence, and by `share` of (layer, head) that hold it a level from 0 (none) to 4.
    """
    marked, visible = set(context.evidence()), _visible(context)
    stretch: Row | None = None
    image, gap = -1, 0
    for i, token in enumerate(context.tokens):
        if not visible[i]:
            gap += 1
            continue
        if context.visual[i]:
            now = -2 if context.places is None else int(context.places[i, 0])
            new, image = now != image and (now >= 0 or image == -1), now
            if not new:
                continue
            piece: Row = {"kind": "image", "image": now if now >= 0 else None}
        else:
            level = None if share is None else int(np.ceil(LEVELS * np.sqrt(share[i])))
            piece = {"kind": "text", "text": token, "marked": i in marked, "level": level}
        if stretch is not None and not gap and _alike(stretch, piece):
            stretch["text"] += piece["text"]
            continue
        if stretch is not None:
            yield stretch
        if gap:
            yield {"kind": "gap", "tokens": gap}
        stretch, gap = piece, 0
    if stretch is not None:
        yield stretch
    if gap:
        yield {"kind": "gap", "tokens": gap}


def _alike(one: Row, other: Row) -> bool:
    return all(one[k] == other.get(k) for k in ("kind", "marked", "level")) if one["kind"] == "text" else False


def _visible(context: Shown) -> NDArray[np.bool_]:
    """Which tokens are shown: all, or of a long text its ends and what lies around evidence; image tokens always."""
    length = len(context.tokens)
    if int((~context.visual).sum()) <= LONGEST:
        return np.ones(length, bool)
    kept = context.visual.copy()
    kept[:EDGE] = kept[-EDGE:] = True
    for place in context.evidence():
        kept[max(0, place - AROUND) : place + AROUND] = True
    return kept
