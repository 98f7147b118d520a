"""An evaluation in several processes gives what one gives."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = ["gates=null", "policies=[keydiff]", "budgets=[20%]", "examples=5", "batch_size=2", "task.ask_subset.n_images=2",
         "task.ask_subset.n_needles=8", "task.ask_subset.n_asked=4", "task.ask_subset.n_turns=2"]  # fmt: skip


def told(file):
    """A summary without how long the answers took."""
    with file.open(newline="") as held:
        rows = list(csv.DictReader(held))
    return [{name: value for name, value in row.items() if not name.startswith("ms_")} for row in rows]


def test_two_processes_share_the_batches(tmp_path):
    from retention.config import compose
    from retention.evaluation.run import run

    run(compose("eval", [*WORDS, f"output_dir={tmp_path / 'one'}"]))
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "eval.py"),
    ]
    done = subprocess.run(
        [*start, *WORDS, f"output_dir={tmp_path / 'two'}"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report.html") == 1
    one, two = (told(tmp_path / name / "summary.csv") for name in ("one", "two"))
    assert one == two
    assert [file.name for file in (tmp_path / "two").glob("examples*")] == ["examples.jsonl"]
