"""The headline tables of an evaluation, and numbers as text."""

from collections.abc import Iterator, Sequence
from typing import Any

from retention.evaluation.equality import FLOOR, plain, shown, unequal_note

Row = dict[str, Any]
NOT_LEARNT = "n/l: the full cache does not get half the way from chance to 1, so shares of it say little."
WITHOUT_FLOOR = "random+protect was not run here, so nothing in this table is held against chance eviction."


def score_text(value: float | None) -> str:
    """A score with three digits."""
    return "n/a" if value is None else f"{value:.3f}"


def interval_text(low: float | None, high: float | None) -> str:
    """An interval with two digits; empty where there is none."""
    return "" if low is None or high is None else f"[{low:.2f}, {high:.2f}]"


def percent_text(value: float | None) -> str:
    """A share as whole percent."""
    return "n/a" if value is None else f"{100 * value:.0f}%"


def above_chance_text(row: Row) -> str:
    """Retention above chance as whole percent; n/l where the full cache has not learnt the task well enough to tell."""
    known = row["full_accuracy"] is not None and row["chance"] is not None
    return "n/l" if known and row["retention_above_chance"] is None else percent_text(row["retention_above_chance"])


def ratio_text(value: float | None) -> str:
    """A ratio with three digits behind a cross."""
    return "n/a" if value is None else f"x{value:.3f}"


def size_text(value: float | None) -> str:
    """A size in the largest binary unit that keeps it at or above one."""
    if value is None:
        return "n/a"
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def accuracy_text(row: Row) -> str:
    """Accuracy with its interval."""
    return f"{score_text(row['accuracy'])} {interval_text(row['ci_low'], row['ci_high'])}".strip()


def scope_text(row: Row) -> str:
    """Global, or per head; of a learned policy also that one training seed is all there is."""
    scope = row["scope"].replace("_", " ")
    return f"{scope}, one seed" if len(row["seed_accuracy"]) == 1 else scope


def _many(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _reference(rows: Sequence[Row]) -> str:
    """What the numbers of one task and protocol are to be held against."""
    full = next((row for row in rows if row["policy"] == "full"), None)
    answers = max(row["n"] // max(1, len(row["seed_accuracy"])) for row in rows)
    counted = f"{_many(answers, 'answer')} in {_many(max(row['n_contexts'] for row in rows), 'context')}"
    parts = [f"chance {score_text(rows[0]['chance'])}", counted]
    if full is not None:
        size = f"{size_text(full['kv_bytes_full'])} (peak {size_text(full['kv_bytes_peak'])})"
        parts.insert(0, f"full cache {accuracy_text(full)} with {size}")
    elif rows[0]["full_accuracy"] is not None:
        parts.insert(0, f"full cache {score_text(rows[0]['full_accuracy'])}")
    if rows[0].get("n_clusters", rows[0]["n_contexts"]) < rows[0]["n_contexts"]:
        parts.append(_many(rows[0]["n_clusters"], "cluster"))
    if not rows[0].get("comparable", True):
        parts.append("scored without the authors' judge: not comparable with published numbers")
    if rows[0].get("judges"):
        parts.append(f"judged by {rows[0]['judges']}")
    seeds = max((len(row["seed_accuracy"]) for row in rows), default=0)
    return ", ".join(parts + ([_many(seeds, "training seed")] if seeds else []))


def mixed_note(rows: Sequence[Row]) -> str | None:
    """One sentence where rows of a table rest on different contexts; None where all rest on the same."""
    if len({row["contexts"] for row in rows}) == 1:
        return None
    counts = [row["n_contexts"] for row in rows]
    spread = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"different sets of {counts[0]}"
    return f"Not all rows rest on the same contexts ({spread}): hold them side by side by the paired comparisons alone."


def sections(summary: Sequence[Row]) -> Iterator[Row]:
    """The headline table of each task and protocol: policies down, budgets across."""
    for task, protocol in dict.fromkeys((row["task"], row["protocol"]) for row in summary):
        rows = [r for r in summary if (r["task"], r["protocol"]) == (task, protocol)]
        below = [row for row in rows if row["policy"] != "full"]
        budgets = list(dict.fromkeys(row["budget"] for row in below))
        lines: dict[tuple[str, str], Row] = {}
        for row in sorted(below, key=lambda r: (not r["seed_accuracy"], r["policy"], r["scope"])):
            name = {"policy": shown(row["policy"]), "scope": scope_text(row), "cells": {}}
            line = lines.setdefault((row["policy"], row["scope"]), name)
            line["learned"] = bool(row["seed_accuracy"])
            line["cells"][row["budget"]] = row
        floored = not below or any(plain(row["policy"]) == FLOOR for row in below)
        unlearnt = any(above_chance_text(row) == "n/l" for row in below)
        notes = (
            None if floored else WITHOUT_FLOOR,
            NOT_LEARNT if unlearnt else None,
            mixed_note(rows),
            unequal_note(rows),
        )
        yield {
            **{"task": task, "protocol": protocol, "reference": _reference(rows), "budgets": budgets},
            **{"lines": list(lines.values()), "rows": rows},
            "notes": [note for note in notes if note],
        }


def table_markdown(summary: Sequence[Row]) -> str:
    """The headline tables as Markdown, policies down and budgets across."""
    blocks = []
    for section in sections(summary):
        head = ["policy", "scope", *section["budgets"]]
        lines = [head, ["---"] * 2 + ["---:"] * len(section["budgets"])]
        for line in section["lines"]:
            cells = [_markdown_cell(line["cells"].get(budget)) for budget in section["budgets"]]
            lines.append([markdown(line["policy"]), line["scope"], *cells])
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        title = f"**{markdown(section['task'])}**, `{section['protocol']}`: {section['reference']}."
        title = " ".join([title, *map(markdown, section["notes"])])
        blocks.append(f"{title}\n\n{table}\n" if section["lines"] else f"{title}\n")
    return "\n".join(blocks)


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, also in a table: no tags, no cells, no lines of its own."""
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "'")):
        text = text.replace(mark, safe)
    return " ".join(text.split())


def _markdown_cell(row: Row | None) -> str:
    if row is None:
        return ""
    sizes = f"{size_text(row['kv_bytes_kept'])}, peak {size_text(row['kv_bytes_peak'])}"
    shares = f"{percent_text(row['retention'])} of full, {above_chance_text(row)} above chance"
    return f"{accuracy_text(row)}<br>{shares}<br>{sizes}<br>{_equal(row)}"


def _equal(row: Row) -> str:
    """Entries by those asked for and bytes by those of random, bold where not equal."""
    told = (("entries", row["entries_ratio"], row["equal_entries"]), ("bytes", row["bytes_ratio"], row["equal_bytes"]))
    parts = [f"{name} {ratio_text(value)}" for name, value, _ in told]
    bold = [f"**{part}**" if equal is False else part for part, (_, _, equal) in zip(parts, told, strict=True)]
    return ", ".join(bold)


def table_text(summary: Sequence[Row]) -> str:
    """The headline tables as aligned plain text of at most 110 columns, a line per setting."""
    head = ("policy", "scope", "budget", "accuracy [95%]", "of full", "kept", "entries", "bytes")
    layout = "{:<26.26} {:<18.18} {:>8.8} {:<20} {:>7} {:>9} {:>7} {:>7}"
    lines = []
    for section in sections(summary):
        lines += [f"{section['task']}  {section['protocol']}"[:110], layout.format(*head)]
        for row in section["rows"]:
            named = (shown(row["policy"]), scope_text(row), row["budget"], accuracy_text(row))
            kept = (percent_text(row["retention"]), size_text(row["kv_bytes_kept"]))
            lines.append(layout.format(*named, *kept, ratio_text(row["entries_ratio"]), ratio_text(row["bytes_ratio"])))
        lines.append("")
    return "\n".join(lines)


def claims_text(claims: Sequence[Row]) -> str:
    """The comparisons of learned policies with the best baseline, or of all with the full cache where there are none."""
    chosen = [c for c in claims if c["learned"] and c["against"] == "best baseline"]
    chosen = chosen or [c for c in claims if c["against"] == "full"]
    return "\n".join(
        f"{c['task']} {c['protocol'].split('/')[0]} {c['budget']}: {shown(c['policy'])} against {c['reference']} "
        f"{difference_text(c)}: {c['verdict']}"
        for c in chosen
    )


def difference_text(claim: Row) -> str:
    """A paired difference in points with its interval, where there is one."""
    spread = "" if claim["low"] is None else f" [{100 * claim['low']:+.1f}, {100 * claim['high']:+.1f}]"
    return f"{100 * claim['difference']:+.1f}{spread}"


def against_text(claim: Row) -> str:
    """What a policy was compared with."""
    if claim["against"] == "full":
        return "full cache"
    return f"best of {_many(claim['n_references'], 'baseline')}: {shown(claim['reference'])}"
