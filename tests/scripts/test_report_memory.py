"""The report on memories in miniature: every arm is measured, and claims follow from the cells."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from retention.gates import RetentionGates
from retention.gates.dbtrim import DBTrim
from retention.models.load import load_frozen

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("report_memory")


@pytest.fixture
def told(script):
    return import_module("memory_page")


def test_a_miniature_measures_every_arm_and_goes_on_where_it_was(script, tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    RetentionGates.for_model(DBTrim(), load_frozen()[0]).save_pretrained(tmp_path / "gates")
    arguments = [
        "--quick",
        "--gates",
        str(tmp_path / "gates"),
        "--work",
        str(tmp_path),
        "--json",
        str(tmp_path / "r.json"),
    ]
    script.main(arguments)
    text, told = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    arms = {(row["policy"], row["memory"]) for row in told["rows"]}
    names, memories = ("trim_kv", "db_trim_kv"), ("retentive", "paper", "moment")
    assert arms == {
        ("full", "none"),
        *((n, "none") for n in names),
        *((p + n, m) for p in script.SPENT for n in names for m in memories),
    }
    size = {(row["policy"], row["memory"]): row["kv_bytes_kept"] for row in told["rows"]}
    for name in names:
        for memory in memories:
            assert abs(size[f"memory+{name}", memory] - size[f"refund+{name}", memory]) < 8 * 264 + 1
            assert size[f"memory+{name}", memory] > size[name, "none"]
    assert {(x["policy"], x["memory"]) for x in told["diagnostics"]} == {
        (n, m) for n in names for m in ("none", *memories)
    }
    assert all(0 < x["missing_mass"] <= x["missing_mass_p90"] < 1 for x in told["diagnostics"])
    assert all(x["recovered"] == 0 for x in told["diagnostics"] if x["memory"] == "none")
    assert "### recall, trim_kv" in text
    assert "| retentive | stays within 1 point" in text
    monkeypatch.setattr(script.Runner, "_rows", lambda *_: pytest.fail("asked again"))
    script.main(arguments)
    again = json.loads((tmp_path / "r.json").read_text())
    assert again["rows"] == told["rows"]
    assert again["claims"] == told["claims"]


def test_gates_are_needed(script, tmp_path):
    with pytest.raises(SystemExit, match="expected trained gates"):
        script.main(["--gates", str(tmp_path / "nothing")])


def made_up(script, levels, sizes=None):
    """Cells of one task at 5%: accuracy by arm, over 40 contexts and 4 turns that are as hard for every arm."""
    found, hard = script.Found(trained={"retentive": True}), np.random.default_rng(0).random((4, 1, 40))
    for name, level in {"full": 0.98, **levels}.items():
        key = ("recall", name, "100%" if name == "full" else "5%", "retentive" if "+" in name else "none")
        found.scores[key] = (hard < level).astype(float)
        found.cells[key] = {
            "accuracy": level,
            "kv_bytes_kept": (sizes or {}).get(name, 100),
            "n_seeds": 1,
            "accuracy_later_turns": level,
        }
    return found


CASES = [
    ({"trim_kv": 0.5, "memory+trim_kv": 0.8, "refund+trim_kv": 0.6, "memory_paid+trim_kv": 0.7}, ["not measured", "yes", "yes", "yes"]),
    ({"trim_kv": 0.5, "memory+trim_kv": 0.8, "refund+trim_kv": 0.9, "memory_paid+trim_kv": 0.3}, ["not measured", "yes", "no, it is worse", "no, it is worse"]),
    ({"trim_kv": 0.5, "memory+trim_kv": 0.5, "refund+trim_kv": 0.5, "memory_paid+trim_kv": 0.5}, ["not measured", *["no difference shown"] * 3]),
    ({"trim_kv": 0.98, "memory+trim_kv": 0.98, "refund+trim_kv": 0.98, "memory_paid+trim_kv": 0.5}, ["yes", "not measured", "not measured", "no, it is worse"]),
    ({"trim_kv": 0.98, "memory+trim_kv": 0.9, "refund+trim_kv": 0.98, "memory_paid+trim_kv": 0.98}, ["no", "not measured", "not measured", "no difference shown"]),
]  # fmt: skip


@pytest.mark.parametrize(("levels", "verdicts"), CASES)
def test_claims_follow_from_the_cells(script, told, levels, verdicts):
    found = told.claims(made_up(script, levels))
    assert [verdict for *_, verdict, _ in found if verdict != "-"] == verdicts
    where = next(numbers for *_, verdict, numbers in found if verdict == "-")
    assert where == ("recall trim_kv 5%" if levels["memory+trim_kv"] > levels["trim_kv"] else "nowhere")


def test_budgets_that_cannot_pay_for_a_state_are_left_out(script, told):
    levels = {"trim_kv": 0.5, "memory+trim_kv": 0.5, "refund+trim_kv": 0.5, "memory_paid+trim_kv": 0.9}
    *_, verdict, numbers = told.claims(made_up(script, levels, {"memory_paid+trim_kv": 150}))[-1]
    assert verdict == "not measured"
    assert "1 cells left out" in numbers
