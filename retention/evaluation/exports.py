"""The numbers of an evaluation for papers and spreadsheets: CSV of every setting and comparison, a LaTeX table."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retention.evaluation.tables import score_text, sections
from retention.files import write_text

Row = dict[str, Any]
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    mark: f"\\{mark}" for mark in "&%$#_{}"
}
HEAD = "% needs \\usepackage{booktabs}; accuracy with its 95% interval, policies down, budgets across\n"


def write_csv(file: Path, rows: Sequence[Row]) -> Path:
    """One line per row; missing is empty, lists are joined by spaces, per-seed numbers are named."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([[_flat(row.get(name)) for name in columns] for row in rows])
    write_text(file, text.getvalue())
    return file


def _flat(value: Any) -> Any:
    if isinstance(value, dict):
        return " ".join(f"{name}={_flat(item)}" for name, item in value.items())
    return " ".join(str(_flat(item)) for item in value) if isinstance(value, list) else value


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(SPECIAL.get(letter, letter) for letter in text)


def table_latex(summary: Sequence[Row]) -> str:
    """The headline tables for LaTeX, one tabular per task and protocol."""
    blocks = []
    for section in sections(summary):
        budgets = section["budgets"]
        head = " & ".join(["policy", *map(escaped, budgets)]) + r" \\"
        lines = [
            " & ".join(
                [escaped(f"{line['policy']} ({line['scope']})"), *(_cell(line["cells"].get(b)) for b in budgets)]
            )
            + r" \\"
            for line in section["lines"]
        ]
        told = f"% {section['task']}, {section['protocol']}: {section['reference']}"
        columns = "l" + "r" * len(budgets)
        body = [r"\toprule", head, r"\midrule", *lines, r"\bottomrule"]
        blocks.append("\n".join([told, rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"]))
    return HEAD + "\n\n".join(blocks) + "\n"


def _cell(row: Row | None) -> str:
    if row is None:
        return "--"
    low, high = row["ci_low"], row["ci_high"]
    spread = "" if low is None or high is None else rf" {{\scriptsize [{low:.2f}, {high:.2f}]}}"
    return score_text(row["accuracy"]) + spread
