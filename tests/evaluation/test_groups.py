"""Clusters of contexts in intervals, and accuracy by group."""

import pytest

from retention.evaluation.groups import by_group
from retention.evaluation.statistics import summarise
from tests.evaluation.test_statistics import answer, full


def rows(cluster):
    """Twelve contexts, equal in threes, under the full cache."""
    found = []
    for i in range(12):
        more = {"cluster": f"v{i // 3}"} if cluster else {}
        found.append(full(example_id=f"c{i:02}", score=float(i // 3 % 2), n_turns=1, **more))
    return found


def test_contexts_of_one_cluster_are_drawn_together():
    (alone,), (together,) = (summarise(rows(cluster)) for cluster in (False, True))
    assert alone["accuracy"] == together["accuracy"] == 0.5
    assert (alone["n_clusters"], together["n_clusters"], together["n_contexts"]) == (12, 4, 12)
    assert [together["ci_low"], together["ci_high"]] == [0.0, 1.0]  # of four clusters
    assert 0.15 < alone["ci_low"] < 0.3
    assert together["comparable"] is True


def test_clusters_of_one_context_change_nothing():
    plain = [answer(example_id=f"c{i}", score=float(i % 3 == 0), n_turns=1) for i in range(9)]
    named = [row | {"cluster": row["example_id"]} for row in plain]
    assert summarise(plain) == summarise(named)


def test_larger_clusters_weigh_more():
    sizes = {"a": 1, "b": 5}
    found = [
        full(example_id=f"{name}{i}", cluster=name, score=float(name == "b"), n_turns=1)
        for name, size in sizes.items()
        for i in range(size)
    ]
    (summary,) = summarise(found)
    assert summary["accuracy"] == pytest.approx(5 / 6)


def test_groups_are_averaged_over_contexts_not_answers():
    found = [
        answer(example_id="c0", turn=0, score=1.0, groups={"level": 1}, readable=True, cut_off=False),
        answer(example_id="c0", turn=1, score=0.0, groups={"level": 1}, readable=False, cut_off=True),
        answer(example_id="c1", score=1.0, groups={"level": 1, "kind": "x"}, readable=None, cut_off=True),
        answer(example_id="c2", score=0.0, groups={"level": 2}, error="broken"),
        answer(example_id="c3", score=0.0, groups={"level": 1}, scored=False, readable=False, cut_off=True),
    ]
    table = {(row["by"], row["group"]): row for row in by_group(found)}
    assert set(table) == {("level", "1"), ("kind", "x")}
    level = table["level", "1"]
    assert (level["n_contexts"], level["accuracy"], level["readable"]) == (2, 0.75, 0.5)
    assert level["cut_off"] == pytest.approx(2 / 3)
    assert table["kind", "x"]["readable"] is None
    assert by_group([answer()]) == []


def test_contexts_of_two_seeds_that_are_called_alike_are_two():
    found = [answer(seed_data=seed, score=float(seed), groups={"level": 1}) for seed in (0, 1, 1)]
    (level,) = by_group(found)
    assert (level["n_contexts"], level["accuracy"]) == (2, 0.5)


def test_the_mean_of_groups_counts_each_alike():
    sizes = {"easy": (3, 1.0), "hard": (1, 0.0)}
    found = [
        answer(example_id=f"{name}{i}", score=score, groups={"level": name}, readable=True)
        for name, (count, score) in sizes.items()
        for i in range(count)
    ]
    assert [(row["group"], row["accuracy"], row["n_contexts"]) for row in by_group(found)] == [
        ("easy", 1.0, 3), ("hard", 0.0, 1), ("mean", 0.5, 4),
    ]  # fmt: skip
    assert [row["readable"] for row in by_group(found)] == [1.0] * 3


def test_presets_of_one_benchmark_are_groups_of_it_and_those_of_other_tasks_are_not():
    tasks = {"ruler_vt": ("ruler", 1.0), "ruler_cwe": ("ruler", 0.0), "needles": ("needles", 1.0)}
    found = [
        answer(task=task, example_id=f"{name}/{task}/{i}", score=score)
        for task, (name, score) in (tasks | {"needles_580": ("needles", 0.0)}).items()
        for i in range(2)
    ]
    told = [(row["task"], row["by"], row["group"], row["accuracy"]) for row in by_group(found)]
    assert told == [("ruler", "preset", "ruler_vt", 1.0), ("ruler", "preset", "ruler_cwe", 0.0), ("ruler", "preset", "mean", 0.5)]  # fmt: skip
    assert by_group([row for row in found if row["task"] != "ruler_cwe"]) == []
