"""Tests of the bootstrap intervals and of the summary of answer rows."""

from typing import Any

import numpy as np
import pytest

from retention.evaluation.statistics import (
    bootstrap_interval,
    holm,
    paired_difference,
    paired_p_value,
    retention_interval,
    summarise,
)

PROTOCOL = "agnostic/multi/after_prefill/original"


def answer(**changes: Any) -> dict[str, Any]:
    row = {
        "task": "needle", "policy": "gates", "scope": "global", "protocol": PROTOCOL,
        "positions": "original", "example_id": "c0", "turn": 0, "n_turns": 2, "seed_data": 0,
        "seed_train": 0, "prediction": "7", "answer": "7", "score": 1.0, "chance": 0.1,
        "kept": 50, "seen": 100, "entries_full": 1000, "error": None,
        "budget": {"requested": "5%", "resolved": 5, "fraction": 0.05},
        "evidence_recall": {"any": 1.0, "mean": 0.5},
        "bytes": {"full": 4000, "kept": 200, "peak": 4400},
    }  # fmt: skip
    return row | changes


def full(**changes: Any) -> dict[str, Any]:
    budget = {"requested": "full", "resolved": 100, "fraction": 1.0}
    row = answer(policy="full", scope="per_head", seed_train=None, budget=budget, kept=1000)
    return row | {"evidence_recall": {"any": None, "mean": None}} | changes


def answers() -> list[dict[str, Any]]:
    """Two contexts of two turns: full is right on all, seed 0 on three of four, seed 1 on two."""
    keys = [(context, turn) for context in ("c0", "c1") for turn in (0, 1)]
    right = {0: (1.0, 1.0, 1.0, 0.0), 1: (1.0, 0.0, 1.0, 0.0)}
    rows = [full(example_id=context, turn=turn) for context, turn in keys]
    for seed, scores in right.items():
        for (context, turn), score in zip(keys, scores, strict=True):
            rows.append(answer(example_id=context, turn=turn, score=score, seed_train=seed))
    return rows


def test_interval_covers_the_truth_at_its_level() -> None:
    rng, truth, contexts, repetitions = np.random.default_rng(5), 0.6, 120, 1000
    covered = 0
    for repetition in range(repetitions):
        ease = rng.beta(1.2, 0.8, size=(contexts, 1))
        scores = (rng.random((contexts, 4)) < ease).mean(axis=1)
        low, high = bootstrap_interval(scores, resamples=500, seed=repetition)
        covered += low <= truth <= high
    assert 0.93 <= covered / repetitions <= 0.97


def test_interval_is_deterministic_and_narrows_with_contexts() -> None:
    scores = np.random.default_rng(0).random(400)
    few, many = bootstrap_interval(scores[:40]), bootstrap_interval(scores)
    assert few == bootstrap_interval(scores[:40])
    assert many[1] - many[0] < few[1] - few[0]


def test_interval_of_several_seeds_carries_the_spread_between_them() -> None:
    same = np.tile(np.tile([0.0, 1.0], 100), (3, 1))
    apart = np.clip(same * 0.2 + np.array([[0.1], [0.4], [0.7]]), 0, 1)
    low, high = bootstrap_interval(apart)
    assert high - low > 0.5
    assert bootstrap_interval(same) == pytest.approx(bootstrap_interval(same[0]), abs=0.02)


def test_interval_hardly_moves_with_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).random((2, 50))
    whole = bootstrap_interval(scores, resamples=4000)
    monkeypatch.setattr("retention.evaluation.statistics.DRAWN_AT_ONCE", 5000)
    assert bootstrap_interval(scores, resamples=4000) == pytest.approx(whole, abs=0.01)


def test_paired_difference_of_identical_scores_is_exactly_zero() -> None:
    scores = np.random.default_rng(0).random((3, 70))
    assert paired_difference(scores, scores) == (0.0, 0.0, 0.0)


def test_paired_difference_is_narrower_than_unpaired() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(200)
    mean, low, high = paired_difference(scores + 0.1, scores + rng.normal(0, 0.01, 200))
    assert low < mean < high
    assert mean == pytest.approx(0.1, abs=0.01)
    assert high - low < 0.01


def test_paired_difference_leaves_out_contexts_without_a_pair() -> None:
    assert paired_difference([1.0, 1.0, 0.0], [0.0, np.nan, 0.0], resamples=50)[0] == 0.5


def test_retention_interval_is_one_for_the_full_cache() -> None:
    scores = np.random.default_rng(0).random(50)
    assert retention_interval(scores, scores) == (1.0, 1.0)
    low, high = retention_interval(scores / 2, scores)
    assert low == high == pytest.approx(0.5)


def test_sign_flips_tell_a_steady_gap_from_noise_and_from_nothing() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=40)
    assert paired_p_value(noise, noise) == 1.0
    assert paired_p_value(noise + 0.2, noise) == 1 / 20_001
    assert paired_p_value(noise + rng.normal(size=40), noise) > 0.05


def test_sign_flips_are_exact_on_few_contexts_and_average_seeds() -> None:
    one = paired_p_value([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    assert abs(one - 2 / 8) < 0.01
    assert paired_p_value([[1.0, 1.0, 1.0], [1.0, 1.0, np.nan]], [0.0, 0.0, 0.0]) == one


def test_sign_flips_are_fair_where_nothing_differs() -> None:
    rng = np.random.default_rng(1)
    found = [paired_p_value(*rng.normal(size=(2, 30)), flips=500) for _ in range(400)]
    assert 0.02 < np.mean(np.array(found) < 0.05) < 0.09


def test_holm_adjusts_step_down_in_the_given_order() -> None:
    assert holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("values", [[], [np.nan], np.zeros((1, 2, 3))])
def test_interval_refuses_what_is_not_scores(values: Any) -> None:
    with pytest.raises(ValueError, match="one mean score per context"):
        bootstrap_interval(values)


def test_holm_refuses_numbers_that_are_no_probabilities() -> None:
    with pytest.raises(ValueError, match="within"):
        holm([0.5, 1.5])


def test_summary_pairs_with_the_full_cache() -> None:
    whole, gates = summarise(answers(), resamples=200)
    assert (whole["policy"], whole["retention"], whole["diff_full_high"]) == ("full", 1.0, 0.0)
    assert gates["accuracy"] == gates["retention"] == 0.625
    assert gates["diff_full"] == -0.375
    assert gates["ci_low"] <= 0.625 <= gates["ci_high"]
    assert (gates["n"], gates["n_contexts"], gates["n_seeds"]) == (8, 2, 2)
    assert (gates["budget"], gates["budget_tokens"], gates["kv_bytes_peak"]) == ("5%", 5, 4400)
    assert gates["kept_fraction"] == 0.05


def test_summary_tells_turns_and_seeds_apart() -> None:
    whole, gates = summarise(answers(), resamples=200)
    assert gates["accuracy_by_turn"] == [1.0, 0.25]
    assert (gates["accuracy_first_turn"], gates["accuracy_later_turns"]) == (1.0, 0.25)
    assert gates["seed_accuracy"] == {"0": 0.75, "1": 0.5}
    assert (gates["seed"], gates["seed_spread"]) == ([0, 1], 0.25)
    assert (whole["seed"], whole["seed_spread"], whole["seed_accuracy"]) == ([0], None, {})


def test_summary_uses_the_same_intervals_as_the_public_functions() -> None:
    _, gates = summarise(answers())
    scores, reference = [[1.0, 0.5], [0.5, 0.5]], [1.0, 1.0]
    assert (gates["ci_low"], gates["ci_high"]) == bootstrap_interval(scores)
    low, high = retention_interval(scores, reference)
    assert (gates["retention_low"], gates["retention_high"]) == (low, high)
    assert paired_difference(scores, reference)[1:] == (
        gates["diff_full_low"],
        gates["diff_full_high"],
    )


def test_summary_leaves_missing_numbers_none() -> None:
    (gates,) = summarise([answer(evidence_recall={"any": None, "mean": None})], resamples=50)
    missing = ("full_accuracy", "retention", "retention_low", "diff_full", "seed_spread")
    assert [gates[name] for name in missing] == [None] * 5
    assert gates["accuracy_later_turns"] is gates["evidence_recall_any"] is None
    _, gates = summarise([full(score=0.0), answer(score=0.0)], resamples=50)
    assert (gates["full_accuracy"], gates["retention"], gates["retention_high"]) == (0, None, None)


def test_retention_above_chance_takes_what_guessing_earns_off_both() -> None:
    gates = summarise(answers(), resamples=200)[1]
    assert gates["retention_above_chance"] == pytest.approx((0.625 - 0.1) / 0.9)
    low, high = gates["retention_above_chance_low"], gates["retention_above_chance_high"]
    assert low == pytest.approx((gates["retention_low"] - 0.1) / 0.9)  # the full cache is always right
    assert low <= gates["retention_above_chance"] <= high
    for score, chance, known in ((0.56, 0.1, True), (0.54, 0.1, False), (1.0, None, False), (1.0, 1.0, False)):
        rows = [full(score=score, chance=chance), answer(score=0.5, chance=chance)]
        found = summarise(rows, resamples=50)[1]
        assert (found["retention_above_chance"] is not None) == known
        assert found["retention"] == pytest.approx(0.5 / score)


def test_summary_falls_back_to_the_full_cache_of_another_protocol() -> None:
    other = full(protocol="agnostic/multi/while_prefilling/original")
    rows = summarise([other, answer(score=0.0)], resamples=50)
    assert [row["full_accuracy"] for row in rows] == [1.0, 1.0]
    assert [row["retention"] for row in rows if row["policy"] == "gates"] == [0.0]


def test_summary_pairs_only_the_contexts_that_full_answered() -> None:
    rows = [full(), answer(score=0.0), answer(example_id="c1")]
    gates = summarise(rows, resamples=50)[1]
    assert (gates["accuracy"], gates["retention"], gates["diff_full"]) == (0.5, 0.0, -1.0)


def test_summary_refuses_errors_unless_allowed() -> None:
    rows = [*answers(), answer(example_id="c2", error="out of memory")]
    with pytest.raises(ValueError, match="allow_errors=1"):
        summarise(rows)
    assert summarise(rows, allow_errors=1, resamples=50) == summarise(answers(), resamples=50)


def test_summary_is_ordered_by_task_protocol_budget_policy_scope() -> None:
    ten = {"requested": "10%", "resolved": 10, "fraction": 0.1}
    rows = [answer(), answer(scope="per_head"), answer(policy="age"), answer(budget=ten)]
    rows += [answer(task="count"), full()]
    order = [(row["task"], row["budget"], row["policy"], row["scope"]) for row in summarise(rows[::-1], resamples=50)]
    assert order == [
        ("count", "5%", "gates", "global"),
        ("needle", "full", "full", "per_head"),
        ("needle", "10%", "gates", "global"),
        ("needle", "5%", "age", "global"),
        ("needle", "5%", "gates", "global"),
        ("needle", "5%", "gates", "per_head"),
    ]
