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
    ]
    table = {(row["by"], row["group"]): row for row in by_group(found)}
    assert set(table) == {("level", "1"), ("kind", "x")}
    level = table["level", "1"]
    assert (level["n_contexts"], level["accuracy"], level["readable"]) == (2, 0.75, 0.5)
    assert level["cut_off"] == pytest.approx(2 / 3)
    assert table["kind", "x"]["readable"] is None
    assert by_group([answer()]) == []
