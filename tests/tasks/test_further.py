"""What rows tell besides their mean score, on hand-made rows and on those of an evaluation."""

from dataclasses import replace

import pytest

from retention.tasks import TASKS
from retention.tasks.benchmarks.milebench import PARTS, MileBench
from retention.tasks.benchmarks.scbench import SCBench
from retention.tasks.deferred_region import DeferredRegion
from retention.tasks.further import asked_again, companions, gap, number_error, worst
from retention.tasks.haystack_any_all import HaystackAnyAll


def row(context, turn, score, **told):
    usual = {"scored": True, "error": None, "seed_train": None, "cluster": context, "groups": {}, "scorer": "symbol"}
    return usual | {"example_id": context, "turn": turn, "score": score, "question": f"q{turn}"} | told


def test_the_worst_turn_counts_once_per_context_and_seed():
    rows = [row("a", 0, 1.0), row("a", 1, 0.5), row("b", 0, 1.0), row("b", 1, 1.0)]
    assert worst(rows) == {"worst": 0.75}
    assert worst([*rows, row("a", 0, 0.0, seed_train=1)]) == {"worst": 0.5}
    assert worst([row("a", 0, 1.0), row("a", 1, 0.0, scored=False)]) == {"worst": 1.0}
    assert worst([]) == {}


def test_counts_that_are_no_numbers_have_no_distance():
    said = [("7", "4"), ("about 2.", "4"), ("red", "4"), ("", "4")]
    rows = [row(str(i), 0, 0.0, prediction=a, answer=b) for i, (a, b) in enumerate(said)]
    assert number_error(rows) == {"numbers": 0.5, "mae": 2.5}
    assert number_error(rows[2:]) == {"numbers": 0.0}


def test_companions_score_the_same_answers_otherwise():
    rows = [
        row("a", 0, 0.0, scorer="index_triplet", prediction="3,1,1", answer="3,1,2"),
        row("b", 0, 0.0, scorer="index_triplet", prediction="2,1,2", answer="3,1,2"),
        row("a", 1, 0.5, scorer="list_soft", prediction="[1, 2]", answer="[1, 3]"),
        row("a", 2, 0.9, scorer="anls", prediction="Kamels", answer="kamel"),
    ]
    assert companions(rows) == {"exact": 0.0, "index_only": 0.5, "list_exact": 0.0}
    assert companions([row("a", 0, 1.0)]) == {}


def test_a_gap_is_taken_over_clusters_that_are_on_both_sides():
    def told(cluster, order, score):
        return row(f"{cluster}-{order}", 0, score, cluster=cluster, groups={"order": order})

    rows = [told("a", "first", 1.0), told("a", "second", 0.0), told("b", "first", 1.0), told("b", "second", 1.0)]
    assert gap([*rows, told("c", "first", 0.0)], "order", "first", "second") == 0.5
    assert gap(rows[:1], "order", "first", "second") is None
    assert DeferredRegion.further(rows) == {"deferred_penalty": 0.5}
    assert DeferredRegion.further(rows[:1]) == {}


def test_sets_are_averaged_by_part_once_all_of_a_part_are_there():
    def sets(part, score, contexts=1):
        return [row(f"{name}-{i}", 0, score, groups={"set": name}) for name in PARTS[part] for i in range(contexts)]

    rows = [*sets("temporal", 0.0), *sets("semantic", 1.0, contexts=2), *sets("diagnostic", 0.25)]
    assert MileBench.further(rows) == {"realistic": 0.5, "temporal": 0.0, "semantic": 1.0, "diagnostic": 0.25}
    assert MileBench.further(rows[1:-1]) == {"semantic": 1.0}
    assert [len(PARTS[part]) for part in ("realistic", "diagnostic")] == [26, 3]
    assert len({name for part in PARTS.values() for name in part}) == 29


def test_the_two_tasks_of_a_mixed_set_are_told_apart():
    mixed, alone = ({"set": name} for name in ("scbench_repoqa_and_kv", "scbench_kv"))
    rows = [
        row("a", 0, 1.0, scorer="function_match", groups=mixed),
        row("a", 1, 0.0, scorer="contains_any", groups=mixed),
        row("a", 2, 0.0, scorer="function_match", groups=mixed),
        row("b", 0, 1.0, scorer="contains_any", groups=alone),
    ]
    assert SCBench.further(rows) == {"repoqa in repoqa_and_kv": 0.5, "kv in repoqa_and_kv": 0.0}
    assert SCBench.further(rows[3:]) == {}


def test_turns_asked_again_are_those_whose_question_came_before():
    rows = [row("a", 2, 1.0, question="q0"), row("a", 0, 0.0), row("a", 1, 0.0), row("b", 0, 0.0, question="q1")]
    assert asked_again(rows) == {"asked_again": 1.0}
    assert asked_again(rows[1:]) == {}


@pytest.mark.parametrize(
    ("task", "changes", "name"),
    [(DeferredRegion(), {"b_first": True}, "order"), (HaystackAnyAll(kind="multi"), {"only_anchors": True}, "shown")],
    ids=["deferred_region", "haystack_any_all"],
)
def test_controls_share_a_cluster_and_not_a_group(task, changes, name):
    one, other = (replace(task, **x).example(0, "test", 3, style="natural") for x in ({}, changes))
    assert one.id != other.id
    assert one.meta["cluster"] == other.meta["cluster"]
    assert one.meta["cluster"] != task.example(0, "test", 4, style="natural").meta["cluster"]
    assert one.meta["groups"][name] != other.meta["groups"][name]
    assert {turn.answer for turn in one.turns} == {turn.answer for turn in other.turns}


def test_every_task_says_nothing_of_no_rows():
    assert not any(task.further([]) for task in TASKS.values())
