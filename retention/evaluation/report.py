"""The report of an evaluation: one self-contained HTML page, and its headline table as text."""

import base64
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PICTURES = {
    "curves.png": "Accuracy over the part of the cache that is kept. Bands are 95% intervals over "
    "contexts and training seeds; the dashed line is the full cache, the dotted line is chance.",
    "deferred.png": "Accuracy by turn at one budget. The cache is evicted once, before the later "
    "questions are known, so what they ask for must have been kept on its own merit.",
    "survival.png": "What is kept of each layer and head. A global budget may give one head much and another nothing.",
    "patches.png": "Images as the model saw them, and below with each patch veiled the more the "
    "shorter its tokens live. Outlined patches hold what the questions ask for.",
}


def _score(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:.2f}, {high:.2f}]"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.0f}%"


def _bytes(value: float | None) -> str:
    """A size in the largest binary unit that keeps it at or above one."""
    if value is None:
        return "n/a"
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def _accuracy(row: Row) -> str:
    return f"{_score(row['accuracy'])} {_interval(row['ci_low'], row['ci_high'])}".strip()


def _scope(row: Row) -> str:
    return row["scope"].replace("_", " ")


def _many(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _reference(rows: Sequence[Row]) -> str:
    """What the numbers of one task and protocol are to be held against."""
    full = next((row for row in rows if row["policy"] == "full"), None)
    parts = [f"chance {_score(rows[0]['chance'])}", _many(rows[0]["n_contexts"], "context")]
    if full is not None:
        size = f"{_bytes(full['kv_bytes_full'])} (peak {_bytes(full['kv_bytes_peak'])})"
        parts.insert(0, f"full cache {_accuracy(full)} with {size}")
    elif rows[0]["full_accuracy"] is not None:
        parts.insert(0, f"full cache {_score(rows[0]['full_accuracy'])}")
    seeds = max((len(row["seed_accuracy"]) for row in rows), default=0)
    return ", ".join(parts + ([_many(seeds, "training seed")] if seeds else []))


def _sections(summary: Sequence[Row]) -> Iterator[Row]:
    """The headline table of each task and protocol: policies down, budgets across."""
    for task, protocol in dict.fromkeys((row["task"], row["protocol"]) for row in summary):
        rows = [r for r in summary if (r["task"], r["protocol"]) == (task, protocol)]
        below = [row for row in rows if row["policy"] != "full"]
        budgets = list(dict.fromkeys(row["budget"] for row in below))
        lines: dict[tuple[str, str], Row] = {}
        for row in sorted(below, key=lambda r: (not r["seed_accuracy"], r["policy"], r["scope"])):
            name = {"policy": row["policy"], "scope": _scope(row), "cells": {}}
            line = lines.setdefault((row["policy"], row["scope"]), name)
            line["learned"] = bool(row["seed_accuracy"])
            line["cells"][row["budget"]] = row
        yield {
            "task": task,
            "protocol": protocol,
            "reference": _reference(rows),
            "budgets": budgets,
            "lines": list(lines.values()),
            "rows": rows,
        }


def table_markdown(summary: Sequence[Row]) -> str:
    """The headline tables as Markdown, policies down and budgets across."""
    blocks = []
    for section in _sections(summary):
        head = ["policy", "scope", *section["budgets"]]
        lines = [head, ["---"] * 2 + ["---:"] * len(section["budgets"])]
        for line in section["lines"]:
            cells = [_markdown_cell(line["cells"].get(budget)) for budget in section["budgets"]]
            lines.append([line["policy"].replace("|", "\\|"), line["scope"], *cells])
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        title = f"**{section['task']}**, `{section['protocol']}`: {section['reference']}."
        blocks.append(f"{title}\n\n{table}\n" if section["lines"] else f"{title}\n")
    return "\n".join(blocks)


def _markdown_cell(row: Row | None) -> str:
    if row is None:
        return ""
    sizes = f"{_bytes(row['kv_bytes_kept'])}, peak {_bytes(row['kv_bytes_peak'])}"
    return f"{_accuracy(row)}<br>{_percent(row['retention'])} of full<br>{sizes}"


def table_text(summary: Sequence[Row]) -> str:
    """The headline tables as aligned plain text of at most 110 columns, a line per setting."""
    head = ("policy", "scope", "budget", "accuracy [95%]", "of full", "kept")
    layout = "  {:<28.28}  {:<9.9}  {:>10.10}  {:<20}  {:>7}  {:>10}"
    lines = []
    for section in _sections(summary):
        lines += [f"{section['task']}  {section['protocol']}"[:110], layout.format(*head)]
        for row in section["rows"]:
            shown = (row["policy"], _scope(row), row["budget"], _accuracy(row))
            kept = (_percent(row["retention"]), _bytes(row["kv_bytes_kept"]))
            lines.append(layout.format(*shown, *kept))
        lines.append("")
    return "\n".join(lines)


def _flat(manifest: Row, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The entries of a nested manifest as dotted names and text."""
    for name, value in manifest.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield f"{prefix}{name}", text


def _pictures(folder: Path) -> Iterator[Row]:
    """The pictures present, as base64 with their captions."""
    for name, caption in PICTURES.items():
        if (folder / name).is_file():
            png = (folder / name).read_bytes()
            wide = round(int.from_bytes(png[16:20], "big") / 1.5)
            data = base64.b64encode(png).decode("ascii")
            yield {"name": Path(name).stem, "caption": caption, "data": data, "width": wide}


def _write_whole(path: Path, text: str) -> None:
    """Put the text at the path in one step, so that no reader meets half a page."""
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def write_report(
    folder: Path,
    *,
    summary: Sequence[Row],
    manifest: Row,
    title: str,
    examples: Sequence[Row] | None = None,
) -> Path:
    """One page report.html in the folder, with the pictures found there inside it.

    Args:
        folder: where the page goes and where curves.png and its like are looked for.
        summary: rows from summarise.
        manifest: how the numbers came about; its "caveats" (a list of sentences) head the page.
        title: of the page.
        examples: turns to show, each with example_id, turn, question, answer and predictions
            (from policy to text); task, and scores (from policy to score), are optional.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"expected a folder for the report, got {folder}; create it first")
    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page.filters |= {"accuracy": _accuracy, "percent": _percent, "bytes": _bytes, "score": _score}
    page.filters["interval"] = lambda row: _interval(row["ci_low"], row["ci_high"])
    text = page.get_template("report.html.j2").render(
        title=title,
        sections=list(_sections(summary)),
        caveats=manifest.get("caveats") or [],
        manifest=list(_flat({k: v for k, v in manifest.items() if k != "caveats"})),
        pictures=list(_pictures(folder)),
        examples=list(examples or []),
    )
    _write_whole(folder / "report.html", text)
    return folder / "report.html"
