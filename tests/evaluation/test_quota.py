"""The preset `quota` in an evaluation: its shares are measured as those of `quota+X`."""

import json
from collections import defaultdict

import pytest
import torch

from retention import RetentionGates
from retention.config import compose
from retention.evaluation.run import run
from retention.gates.dbtrim import DBTrim
from retention.models.load import load_frozen

TINY = ["task.ask_subset.n_images=4", "task.ask_subset.n_needles=12", "task.ask_subset.n_asked=6", "task.ask_subset.n_turns=2"]  # fmt: skip
CHANGING = ("policy", "policy_args", "seconds_per_context", "ms", "bytes")
SAME = ["examples=2", "batch_size=2", "quota_examples=2", "budgets=[10%,24]"]


@pytest.fixture(scope="module")
def gates(tmp_path_factory):
    torch.manual_seed(0)
    model, _ = load_frozen("embedded")
    made, folder = RetentionGates.for_model(DBTrim(), model), tmp_path_factory.mktemp("gates")
    for name, parameter in made.named_parameters():
        if "offset" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(folder)
    return folder


def rows_of(folder, gates, *words):
    """Rows without what may differ between two policies that choose alike, by policy."""
    run(compose("eval", [f"gates={gates}", f"output_dir={folder}", *SAME, *TINY, *words]))
    found = defaultdict(list)
    for row in map(json.loads, (folder / "examples.jsonl").read_text().splitlines()):
        found[row["policy"]].append({k: v for k, v in row.items() if k not in CHANGING})
    return found


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("base", ["keydiff", "snapkv"])
def test_quota_is_quota_plus_its_base_row_by_row(base, gates, tmp_path):
    chosen = [] if base == "keydiff" else [f"policy.quota.base={base}"]
    rows = rows_of(tmp_path, gates, f"policies=[quota,quota+{base},{base}]", *chosen)
    assert len(rows["quota"]) == 2 * 2 * 2
    assert rows["quota"] == rows[f"quota+{base}"]
    assert [row["evidence_recall"] for row in rows["quota"]] != [row["evidence_recall"] for row in rows[base]]


def test_quota_needs_gates_in_an_evaluation(tmp_path):
    with pytest.raises(ValueError, match="the policies quota need trained gates"):
        run(compose("eval", ["gates=null", "policies=[quota]", f"output_dir={tmp_path}", *TINY]))
