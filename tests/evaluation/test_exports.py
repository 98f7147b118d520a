"""Numbers for spreadsheets and papers."""

import csv
from pathlib import Path

from retention.evaluation.exports import escaped, table_latex, write_csv
from retention.evaluation.statistics import summarise
from tests.evaluation.test_claims import rows


def test_csv_holds_every_number(tmp_path: Path) -> None:
    summary = summarise([*rows("full", 1.0), *rows("db_trim_kv", 0.5, seed=3), *rows("random", 0.25)], resamples=50)
    with write_csv(tmp_path / "s.csv", summary).open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["policy"] for row in read] == [row["policy"] for row in summary]
    own = next(row for row in read if row["policy"] == "db_trim_kv")
    assert float(own["accuracy"]) == 0.5
    assert own["seed_accuracy"] == "3=0.5"
    assert own["accuracy_later_turns"] == ""
    assert (own["entries_ratio"], own["equal_entries"], own["bytes_ratio"], own["equal_bytes"]) == (
        "1.0",
        "True",
        "1.0",
        "True",
    )


def test_latex_is_a_table_that_prints_its_names() -> None:
    text = table_latex(summarise([*rows("full", 1.0), *rows("db_trim_kv", 0.5, seed=0)], resamples=50))
    lines = text.splitlines()
    assert r"\begin{tabular}{lr}" in lines
    assert r"policy & 5\% \\" in lines
    assert any(line.startswith(r"db\_trim\_kv (per head, one seed) & 0.500 {\scriptsize [") for line in lines)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    assert escaped("a_b%\\") == r"a\_b\%\textbackslash{}"
