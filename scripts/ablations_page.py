"""What `table_ablations.py` says about its cells: the table, verdicts on what the papers report, and the page."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retention.provenance import hardware, package_versions

ALPHA = 0.05
COLUMNS = (
    "ablation", "group", "policy", "budget", "accuracy", "ci_low", "ci_high", "diff", "diff_low", "diff_high", "p",
    "kept_fraction", "kv_bytes_kept", "n", "n_contexts", "n_seeds",
)  # fmt: skip
EXPECTED = (
    ("without_capacity", "loses most of all losses (AIME24 75.8 to 42.9 in arXiv 2512.03324)"),
    ("without_kl", "loses a little (75.8 to 72.1 there)"),
    ("without_ntp", "loses a little (75.8 to 72.5 there)"),
    ("linear_gate", "loses: an MLP is better than a linear gate (secondary source)"),
)


def _cell(found: Any, key: tuple[str, str, str]) -> str:
    cell = found.cells.get(key)
    if cell is None:
        return ""
    if "diff" not in cell:
        return f"{cell['accuracy']:.3f} [{cell['ci_low']:.2f}, {cell['ci_high']:.2f}]"
    sure = "\\*" if cell["p"] < ALPHA else ""
    return f"{cell['accuracy']:.3f} {100 * cell['diff']:+.1f} [{100 * cell['diff_low']:.1f}, {100 * cell['diff_high']:.1f}]{sure}"


def table(found: Any, policies: Sequence[str], budgets: Sequence[str]) -> list[str]:
    """Rows are ablations, columns policies and budgets."""
    heads = [f"{policy} {budget}" for policy in policies for budget in budgets]
    lines = [f"| ablation | of | gate parameters | {' | '.join(heads)} |", "|---|---|---:|" + "---|" * len(heads)]
    for name, count in found.parameters.items():
        group = next(cell["group"] for key, cell in found.cells.items() if key[0] == name)
        cells = [_cell(found, (name, policy, budget)) for policy in policies for budget in budgets]
        lines.append(f"| {name} | {group} | {count:,} | {' | '.join(cells)} |")
    return lines


def _gap(found: Any, name: str, policy: str = "db_trim_kv") -> list[dict[str, Any]]:
    return [cell for key, cell in found.cells.items() if key[:2] == (name, policy) and "diff" in cell]


def _told(cells: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{c['budget']}: {100 * c['diff']:+.1f}" for c in cells)


def _verdict(cells: Sequence[dict[str, Any]]) -> str:
    """Confirmed where the interval over contexts and seeds lies below 0 as well; contexts alone leave seeds open."""
    sure = [c for c in cells if c["p"] < ALPHA]
    worse, better = (sum(sign * c[end] > 0 for c in sure) for sign, end in ((-1, "diff_high"), (1, "diff_low")))
    if worse or better:
        return "refuted" if better and not worse else "confirmed" if not better else "holds in part"
    return "with some seeds only" if any(c["diff"] < 0 for c in sure) else "not seen"


def verdicts(found: Any) -> list[tuple[str, str, str]]:
    """What was expected, whether it holds here, and the differences to the demo under the global pool."""
    told = []
    for name, expected in EXPECTED:
        cells = _gap(found, name)
        if cells:
            told.append((f"{name} {expected}", _verdict(cells), _told(cells)))
    losses = {
        name: sum(c["diff"] for c in _gap(found, name)) for name in ("without_capacity", "without_kl", "without_ntp")
    }
    if all(_gap(found, name) for name in losses):
        least = min(losses, key=lambda name: losses[name])
        told.append(
            (
                "The capacity term matters most of the three",
                "confirmed" if least == "without_capacity" else "refuted",
                f"largest loss: {least}",
            )
        )
    own = {"10%": "large_budget", "1.25%": "small_budget"}
    for name, what in ((
        "budget_conditioned", "One budget-conditioned checkpoint"), ("demo", "One checkpoint trained on a range of budgets, not conditioned,"
    )):  # fmt: skip
        gaps = []
        for budget, other in own.items():
            pair = [found.cells.get((row, "db_trim_kv", budget)) for row in (name, other)]
            if all(pair):
                gaps.append((budget, pair[0]["accuracy"] - pair[1]["accuracy"]))
        if gaps:
            worst = min(gap for _, gap in gaps)
            verdict = "within 1 point everywhere" if worst >= -0.01 else f"down to {100 * worst:.1f} points"
            told.append(
                (
                    f"{what} against gates trained for each budget alone",
                    verdict,
                    ", ".join(f"{b}: {100 * g:+.1f}" for b, g in gaps),
                )
            )
    return told


def page(found: Any, policies: Sequence[str], budgets: Sequence[str]) -> str:
    """Conditions, verdicts, table."""
    versions, machine = package_versions(), hardware()
    parts = [
        "# Ablations of the gates on the embedded model", "",
        f"Command: `python scripts/table_ablations.py`. Every row is the demo (`python train.py`) with one thing changed, trained for {found.steps} steps, a quarter of the demo's schedule, "
        f"with {found.seeds} seeds. Task `ask_subset`, test scans, eviction before any question is read, {found.full['n_contexts']} contexts, {found.full['n'] // found.full['n_contexts']} answers each; "
        f"full cache {found.full['accuracy']:.3f}. `db_trim_kv`: one pool for all layers and heads; `trim_kv`: every head by itself.", "",
        f"Machine: {machine['cpu']}, {machine['threads']} threads. torch {versions['torch']}, transformers {versions['transformers']}, "
        f"retention {versions['retention']} at {versions['git'][:10]} (uncommitted changes: {versions['git_dirty']}). Each artefact names the commit it was trained at.", "",
        "A cell: accuracy, then the paired difference to the demo in points with its 95% bootstrap interval over contexts and seeds; "
        f"`*`: a sign-flip test over contexts, seeds as drawn, at {ALPHA:g}, Holm-corrected over the table; beside an interval across 0 it says that some seeds differ and others do not. The demo's row: accuracy with its interval. "
        "The model is tiny and the contexts are short: rows say which parts matter here, not on large models. "
        "`published_offset` starts at half-lives of 45 million tokens, made for contexts a hundred times as long.", "",
        "## What was expected", "", "| expected | verdict | points against the demo, global pool |", "|---|---|---|",
        *(f"| {claim} | **{verdict}** | {numbers} |" for claim, verdict, numbers in verdicts(found)), "",
        "## Table", "", *table(found, policies, budgets), "",
    ]  # fmt: skip
    return "\n".join(parts)


def write_cells(found: Any, file: Path) -> None:
    """Every cell as a row of a CSV."""
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for cell in found.cells.values():
            writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in cell.items()})
