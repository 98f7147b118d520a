"""The table of training signals: what it reads off scores, and its miniature."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from retention.policies import POLICIES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("table_signals")


def test_every_objective_is_a_signal(script):
    assert {script.objective_of(signal) for signal in script.SIGNALS} == {
        p.gates_of for p in POLICIES.values() if p.gates_of
    }


def test_the_best_and_its_equals_follow_from_the_scores(script):
    rng = np.random.default_rng(0)
    base = (rng.random((4, 1, 60)) < 0.8).astype(float)
    scores = {}
    for allocator in script.ALLOCATORS:
        scores["good", allocator, "5%"] = base
        scores["same", allocator, "5%"] = np.where(rng.random(base.shape) < 0.02, 1 - base, base)
        scores["bad", allocator, "5%"] = base * (rng.random(base.shape) < 0.5)
    lines = script.reading(scores, ("bad", "same", "good"), ("5%",))
    assert len(lines) == 2
    assert all("bad" not in line.split("not told apart")[1] for line in lines)
    assert all({"same", "good"} & set(line.replace(".", " ").replace(",", " ").split()) for line in lines)


def test_a_regression_step_costs_less_than_distillation(script):
    cost = {
        s: script.step_seconds(script.gates_for("plain", s)[1] + ["data.batch_size=2"])
        for s in ("distillation", "kvzap")
    }
    assert 0 < cost["kvzap"] < cost["distillation"]
