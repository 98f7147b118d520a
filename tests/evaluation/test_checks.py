"""What a run holds its caches to, and what a manifest says of rows: a wrong cache or an exception stops everything."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from retention import Budget, CacheConfig
from retention.budget import ALLOCATORS, uniform
from retention.config import compose
from retention.data.render import Renderer
from retention.evaluation.arms import Arm
from retention.evaluation.checks import over_budget, questions_hash
from retention.evaluation.protocol import Protocol
from retention.evaluation.run import run
from retention.evaluation.runner import Runner
from retention.models import family_of
from retention.policies.knorm import Knorm
from retention.provenance import without_paths
from retention.tasks.needles import Needles
from tests.evaluation.test_statistics import answer


def test_the_hash_is_of_questions_and_answers_alone():
    rows = [answer(question="a", turn=0), answer(question="b", turn=1)]
    same = questions_hash(rows)
    assert same == questions_hash([*rows[::-1], answer(question="a", policy="full", score=0.0)])
    assert same != questions_hash([rows[0] | {"answer": "8"}, rows[1]])


def test_rows_over_their_budget_are_counted():
    rows = [answer(kept=50), answer(kept=51), answer(kept=99, error="broken")]  # 5 entries in each of 10 heads
    assert over_budget(rows) == 1


def test_paths_from_the_root_are_not_told():
    inside = Path("outputs/gates").absolute()
    told = {
        "command": f"python eval.py gates={inside},/home/me/b 'output_dir=/home/me/a run'",
        "seeds": (0, 1),
        "on": None,
    }
    assert without_paths(told) == {
        "command": "python eval.py gates=outputs/gates,.../b 'output_dir=.../a run'", "seeds": [0, 1], "on": None,
    }  # fmt: skip
    for kept in ("llava-hf/llava-1.5-7b-hf", "https://example.org/x/y", "1 / 2 and/or 3", "outputs/latest/gates"):
        assert without_paths([kept]) == [kept]


@dataclass
class Misbehaving(Knorm):
    """Gets its counts from an allocator that a test puts in the table."""

    allocator = "misbehaving"


@dataclass
class Broken(Knorm):
    """A policy with a mistake in it."""

    def score(self, kv):
        """Fails."""
        raise FloatingPointError("no score today")


@pytest.fixture(scope="module")
def runner(embedded_model, embedded_processor):
    renderer = Renderer(embedded_processor, family_of(embedded_model).visual_ids(embedded_model.config))
    return Runner(embedded_model, renderer, "symbolic")


@pytest.fixture(scope="module")
def batch(runner):
    task = Needles(n_images=2, n_needles=4, n_turns=2)
    return runner.renderer.render([task.example(0, "test", 0), replace(task, n_images=3).example(0, "test", 1)])


def rows_of(runner, batch, policy, **cache):
    arm = Arm("mine", policy, CacheConfig(Budget.parse("16"), **cache), "16", Protocol(), needs_gates=False)
    ((_, _, rows),) = runner.run(batch, [arm], None)
    return rows


def greedy(budget, given):
    """One entry too many for every head."""
    return uniform(budget + 1, given)


def lazy(budget, given):
    """All there is."""
    return given.available


@pytest.mark.parametrize(("counts", "said"), [(greedy, "kept too much"), (lazy, "evicted nothing")])
def test_a_policy_beyond_its_budget_stops_the_run(runner, batch, monkeypatch, counts, said):
    monkeypatch.setitem(ALLOCATORS, "misbehaving", counts)
    where = r"needles/2x4-any/test/0/0: expected at most 128 entries \(16 per layer and head\), got \d+"
    with pytest.raises(RuntimeError, match=f"mine {said} of {where}"):
        rows_of(runner, batch, Misbehaving())


def test_rounding_may_cost_a_pyramid_its_exact_total_but_no_more(runner, batch, monkeypatch):
    monkeypatch.setitem(ALLOCATORS, "misbehaving", greedy)
    rows = rows_of(runner, batch, Misbehaving(), integer_floor=True)
    assert over_budget([row | {"task": "needles"} for row in rows]) == len(rows)
    monkeypatch.setitem(ALLOCATORS, "misbehaving", lazy)
    with pytest.raises(RuntimeError, match="mine evicted nothing"):
        rows_of(runner, batch, Misbehaving(), integer_floor=True)


@pytest.mark.parametrize("budget", ["9999", "16"])
def test_what_fits_or_goes_by_a_threshold_passes(runner, batch, budget):
    told = {"selector": "threshold", "threshold": -1e9} if budget == "16" else {}
    arm = Arm("k", Knorm(), CacheConfig(Budget.parse(budget), **told), budget, Protocol(), needs_gates=False)
    ((_, _, rows),) = runner.run(batch, [arm], None)
    assert all(row["kept"] == row["entries_full"] for row in rows)


def test_an_exception_in_the_cache_aborts_the_run(tmp_path):
    small = ["task.needles.n_images=2", "task.needles.n_needles=4", "task.needles.n_turns=2", "tasks=[needles]"]
    told = ["gates=null", "policies=[knorm]", "budgets=[16]", "examples=1", f"output_dir={tmp_path}", *small]
    config = compose("eval", told)
    config.policy["knorm"] = Broken()
    with pytest.raises(FloatingPointError, match="no score today"):
        run(config)
    assert '"policy": "knorm"' not in (tmp_path / "examples.jsonl").read_text()
    assert not (tmp_path / "manifest.json").exists()
    assert not (tmp_path / "summary.json").exists()
