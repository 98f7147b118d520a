"""The table of all policies in miniature: what it runs, what it leaves out, and how claims follow from cells."""

import csv
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from retention.policies import POLICIES
from retention.policies.keydiff import KeyDiff

ROOT = Path(__file__).parents[2]


class NeedsARow(KeyDiff):
    """A policy that cannot decide once a question was seen."""

    def score(self, kv):
        """Refuse prompts that end in a question."""
        if int(kv.positions.max()) > 328:
            raise ValueError("NeedsARow reads window rows and got none")
        return super().score(kv)


class Broken(KeyDiff):
    """A policy with a bug."""

    def score(self, kv):
        """Fail in a way that nobody meant."""
        raise KeyError("oops")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("table_policies")


@pytest.fixture
def told(script):
    return import_module("policies_page")


@pytest.fixture
def few(script, monkeypatch):
    """A handful of policies, two of which do not work everywhere."""
    base, names = script.compose("eval", ["gates=null"]), ("full", "random", "keydiff", "db_trim_kv", "oracle")
    table = {name: POLICIES[name] for name in names} | {"needs_a_row": NeedsARow, "broken": Broken}
    for registry in (script.POLICIES, base.policy):
        made = table if registry is script.POLICIES else {name: policy() for name, policy in table.items()}
        for name in list(registry):
            monkeypatch.delitem(registry, name)
        for name, policy in made.items():
            monkeypatch.setitem(registry, name, policy)
    monkeypatch.setattr(
        script, "compose", lambda *_: script.replace(base, policies=["random"], examples=2, batch_size=2)
    )
    return table


def test_every_cell_is_measured_or_left_out_with_a_reason(script, told, few, tmp_path, capsys):
    bench, found = script.Bench(tmp_path, True), script.Found()
    script.evaluate_task(found, bench, "text_heavy", {})
    assert {key[:3] for key in found.cells} == {
        *(("text_heavy", p, n) for p in ("agnostic", "aware") for n in ("full", "random", "keydiff", "oracle")),
        ("text_heavy", "agnostic", "needs_a_row"),
    }
    reasons = {key[2]: why for key, why in found.refused.items()}
    assert reasons == {
        "needs_a_row": "NeedsARow reads window rows and got none",
        "broken": "failed with KeyError: 'oops'",
        "db_trim_kv": "no gates trained with objective distillation on this task",
    }
    assert found.best_heuristic("text_heavy", "agnostic", "5%") in ("keydiff", "needs_a_row")
    same = (
        found.cells["text_heavy", "agnostic", "needs_a_row", "5%"],
        found.cells["text_heavy", "agnostic", "keydiff", "5%"],
    )
    assert same[0]["accuracy"] == same[1]["accuracy"]
    rows = len(bench.rows("text_heavy"))
    again = script.Found()
    script.evaluate_task(again, bench, "text_heavy", {})
    assert len(bench.rows("text_heavy")) == rows
    assert again.cells == found.cells

    script.evaluate_task(found, bench, "diffuse_count", {})
    assert found.not_learnt["diffuse_count"]["accuracy"] < 0.55
    text = told.page(found, budgets=script.BUDGETS, pictures=["a_b.png"])
    assert "- diffuse_count: the full cache scores 0." in text
    assert "| `needs_a_row` | text_heavy aware 5% | NeedsARow reads window rows and got none |" in text
    assert "### text_heavy, aware" in text
    assert "![a b](a_b.png)" in text
    told.write_cells(found, tmp_path / "policies.csv")
    lines = list(csv.DictReader((tmp_path / "policies.csv").read_text().splitlines()))
    assert len(lines) == len(found.cells)
    assert set(lines[0]) == set(told.COLUMNS)
    assert all(int(line["kv_bytes_peak"]) >= int(line["kv_bytes_kept"]) > 0 for line in lines)


def made_up(script, levels, task="needles", protocol="agnostic", first=None):
    """Cells of one task at 5%, accuracy by policy, over 40 contexts and 4 turns."""
    found, rng = script.Found(), np.random.default_rng(0)
    for name, level in levels.items():
        key = (task, protocol, name, "100%" if name == "full" else "5%")
        scores = (rng.random((4, 1, 40)) < level).astype(float)
        if first and name in first:
            scores[0] = rng.random((1, 40)) < first[name]
        found.scores[key] = scores
        learned = name in ("db_trim_kv", "trim_kv")
        found.cells[key] = {"accuracy": scores.mean(), "learned": learned, "reference": name == "oracle", "chance": 0.1}
    return found


@pytest.mark.parametrize(
    ("ours", "own", "verdict"), [(0.9, 0.5, "confirmed"), (0.5, 0.9, "refuted"), (0.7, 0.7, "refuted")]
)
def test_global_over_per_head_follows_from_the_rows(script, told, ours, own, verdict):
    found = made_up(script, {"full": 0.95, "db_trim_kv": ours, "trim_kv": own, "keydiff": 0.3, "oracle": 0.99})
    claim, said, numbers = told.claims(found)[0]
    assert "one global pool" in claim
    assert said == verdict
    assert "of 1 cells" in numbers


def test_the_best_heuristic_is_no_reference_and_nothing_learned(script, told):
    found = made_up(
        script, {"full": 1.0, "db_trim_kv": 0.9, "trim_kv": 0.8, "keydiff": 0.6, "h2o": 0.3, "oracle": 0.99}
    )
    assert found.best_heuristic("needles", "agnostic", "5%") == "keydiff"
    claim, said, numbers = told.claims(found)[1]
    assert "heuristic" in claim
    assert said == "confirmed"
    assert numbers.endswith("Best without gates, chosen on these very answers: keydiff.")


def test_tgv_kv_is_judged_by_the_turn_it_saw(script, told):
    levels = {"full": 0.98, "tgv_kv": 0.2}
    found = made_up(script, levels, protocol="aware", first={"tgv_kv": 1.0})
    verdicts = {claim: said for claim, said, _ in told.claims(found) if claim.startswith("TGV")}
    near, _, later, blind, images = verdicts.values()
    assert (near, later, blind, images) == ("confirmed", "confirmed", "not measured", "not measured")
    found = made_up(script, levels | {"tgv_kv": 0.97}, protocol="agnostic")
    assert [said for claim, said, _ in told.claims(found) if "no question" in claim] == ["refuted"]


def test_pictures_are_drawn_from_the_summary(script, few, tmp_path, monkeypatch):
    bench, found = script.Bench(tmp_path / "eval", True), script.Found()
    monkeypatch.setattr(script, "DRAWN", ("needles",))
    script.evaluate_task(found, bench, "needles", {})
    names = script.draw(found, tmp_path)
    assert names == ["policies_agnostic.png", "policies_aware.png", "policies_by_turn.png"]
    assert sorted(file.name for file in tmp_path.glob("policies*")) == sorted(names)


def test_gates_that_are_there_are_taken_and_others_left_out_of_a_quick_run(script, tmp_path):
    for training in script.TRAININGS:
        (tmp_path / "train" / f"{training}_seed0" / "gates").mkdir(parents=True)
    found = script.gate_folders(tmp_path, True, True)
    assert found == {(t, "distillation"): str(tmp_path / "train" / f"{t}_seed0" / "gates") for t in script.TRAININGS}
