"""The ablation table: rows that compose, cells and verdicts that follow from scores."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from retention.config import compose

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("table_ablations")


def test_every_row_changes_something(script):
    demo = compose("train", ["output_dir=x"])
    evaluated = compose("eval", ["gates=null", "output_dir=x"])
    for ablation in script.ABLATIONS[1:]:
        if ablation.train:
            config = compose("train", [*ablation.train, "output_dir=x"])
            assert (config.gate, config.objective) != (demo.gate, demo.objective), ablation.name
        else:
            config = compose("eval", ["gates=null", "output_dir=x", *ablation.evict])
            assert (config.policy, config.cache) != (evaluated.policy, evaluated.cache), ablation.name


def made_up(script, levels):
    found, rng = script.Found(), np.random.default_rng(0)
    luck = rng.random((4, 3, 80))
    for name, level in levels.items():
        for policy in script.POLICIES:
            key = (name, policy, "5%")
            found.scores[key] = (luck < level).astype(float)
            mean = found.scores[key].mean()
            found.cells[key] = {
                "accuracy": mean,
                "ci_low": mean,
                "ci_high": mean,
                "budget": "5%",
                "group": "x",
                "policy": policy,
            }
        found.parameters[name] = 10
    script.compare(found)
    return found


def test_verdicts_follow_from_scores(script):
    levels = {
        "demo": 0.9,
        "without_capacity": 0.2,
        "without_kl": 0.7,
        "without_ntp": 0.9,
        "budget_conditioned": 0.6,
        "small_budget": 0.9,
    }
    found = made_up(script, levels)
    told = {claim.split()[0]: verdict for claim, verdict, _ in script.verdicts(found)}
    assert told["without_capacity"] == told["without_kl"] == "confirmed"
    assert told["without_ntp"] == "not seen"
    assert told["The"] == "confirmed"
    worse = made_up(script, levels | {"without_capacity": 0.9, "without_kl": 0.1})
    assert {c.split()[0]: v for c, v, _ in script.verdicts(worse)}["The"] == "refuted"


def test_the_table_has_every_row_and_marks_differences(script):
    found = made_up(script, {"demo": 0.9, "without_kl": 0.3})
    lines = script.table(found, script.POLICIES, ("5%",))
    assert len(lines) == 4
    assert "\\*" in lines[-1]
    assert "[0.9" in lines[-2] or "[0.8" in lines[-2]


def test_the_page_is_made_of_the_cells(script):
    from ablations_page import page

    found = made_up(script, {"demo": 0.9, "without_capacity": 0.3})
    found.full = {"accuracy": 0.95, "n": 256, "n_contexts": 32}
    text = page(found, script.POLICIES, ("5%",))
    assert "32 contexts, 8 answers each" in text
    assert "| without_capacity loses most" in text


def test_an_unknown_row_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--only", "nothing"])
    assert "expected --only among demo" in capsys.readouterr().err
