"""Draw one sheet per procedural task: the images and texts of a context, its evidence outlined, and what is asked.

Usage: python scripts/contact_sheets.py [needle tile_index ...] [--out outputs/contact_sheets] [--seed 0] [--tier hard]
Names are those of `configs/task/`; without any, all procedural tasks.
"""

import argparse
import textwrap
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw

from retention.config import compose
from retention.data.example import EvidenceRef, Example, TextRef
from retention.evaluation.config import EvalConfig
from retention.evaluation.drawing import COLOURS
from retention.tasks import Task
from retention.tasks.benchmarks import BENCHMARKS

TILE, GAP, COLUMNS, LINE, WIDTH = 112, 6, 8, 14, 150
"""Pixels of an image's side and around it, images per row, pixels of a line of text, characters of one."""


def sheet(example: Example) -> Image.Image:
    """A context as a picture: images in order, then its text, then the turns, each in the colour of its evidence."""
    shown = example.images + [segment.payload for segment in example.later if segment.kind == "image"]
    lines = _lines(example)
    rows = -(-len(shown) // COLUMNS)
    size = (COLUMNS * (TILE + GAP) + GAP, rows * (TILE + GAP) + GAP + LINE * (len(lines) + 1))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for number, image in enumerate(shown):
        canvas.paste(Image.fromarray(image).resize((TILE, TILE), Image.Resampling.NEAREST), _corner(number))
    for number, turn in enumerate(example.turns):
        for ref in (ref for ref in turn.evidence if isinstance(ref, EvidenceRef)):
            left, top = _corner(ref.image)
            cell = TILE / example.meta["grid"]
            inset = 1 + 2 * (number % 3)
            box = (left + ref.column * cell, top + ref.row * cell)
            draw.rectangle(
                (box[0] + inset, box[1] + inset, box[0] + cell - inset, box[1] + cell - inset),
                outline=COLOURS[number % len(COLOURS)],
                width=2,
            )
    for i, (line, colour) in enumerate(lines):
        draw.text((GAP, rows * (TILE + GAP) + GAP + i * LINE), line, fill=colour)
    return canvas


def _corner(number: int) -> tuple[int, int]:
    row, column = divmod(number, COLUMNS)
    return GAP + column * (TILE + GAP), GAP + row * (TILE + GAP)


def _lines(example: Example) -> list[tuple[str, str]]:
    """Lines of text with their colours."""
    told = [(example.id, "black")]
    for segment in [*example.segments, *example.later]:
        told += [(line, "#5a6270") for line in textwrap.wrap(segment.payload, WIDTH)] if segment.kind == "text" else []
    for number, turn in enumerate(example.turns):
        warm = "" if turn.scored else " (not scored)"
        spans = [ref for ref in turn.evidence if isinstance(ref, TextRef)]
        read = " | ".join(example.segments[ref.segment].payload[ref.start : ref.end] for ref in spans)
        lines = [f"{number + 1}. {turn.question} -> {turn.answer}{warm}", f"   evidence: {read}"][: 1 + bool(read)]
        colour = COLOURS[number % len(COLOURS)]
        told += [(line, colour) for text in lines for line in textwrap.wrap(text, WIDTH)]
    return [(line.encode("ascii", "replace").decode(), colour) for line, colour in told]


def asked_for(parser: argparse.ArgumentParser, names: list[str]) -> dict[str, Task]:
    """The presets of these names that draw their own contexts; all of them where none is named."""
    config = compose("eval")
    assert isinstance(config, EvalConfig)
    known = {name: task for name, task in config.task.items() if type(task).name not in BENCHMARKS}
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"expected procedural tasks out of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    return {name: known[name] for name in names or known}


def main(arguments: list[str] | None = None) -> list[Path]:
    """Write the sheets; returns their files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("outputs/contact_sheets"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test")
    parser.add_argument("--tier", choices=("symbolic", "rendered", "hard"), help="of tasks that have tiers")
    options = parser.parse_args(arguments)
    tasks = asked_for(parser, options.tasks)
    options.out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, task in tasks.items():
        if options.tier in getattr(task, "tiers", ()):
            task = replace(task, tier=options.tier)
        files.append(options.out / f"{name}.png")
        sheet(task.example(options.seed, options.split, 0, style="natural")).save(files[-1])
    print(f"wrote {len(files)} sheets to {options.out}; evidence is outlined in the colour of its question")
    return files


if __name__ == "__main__":
    main()
