"""What is called better: paired, adjusted for all comparisons, and never within reach of chance eviction."""

from typing import Any

import numpy as np
import pytest

from retention.evaluation.claims import BETTER, OPEN, WORSE, Cell, compare_all, gaps, is_baseline
from retention.evaluation.statistics import holm, paired_difference, paired_p_value, summarise
from retention.evaluation.tables import claims_text

CONTEXTS = 40


def rows(policy: str, right: float, *, seed: int | None = None, draw: int = 0, **changes: Any) -> list[dict[str, Any]]:
    """One answer per context; the first share of a fixed order of contexts is right."""
    budget = "100%" if policy == "full" else "5%"
    order = np.random.default_rng(draw).permutation(CONTEXTS)
    return [
        {
            "task": "t", "policy": policy, "scope": "per_head", "protocol": "agnostic/multi/after_prefill/original",
            "positions": "original", "example_id": f"c{i}", "turn": 0, "n_turns": 1, "seed_data": 0, "seed_train": seed,
            "score": float(order[i] < right * CONTEXTS), "chance": 0.1, "kept": 50, "seen": 100, "entries_full": 1000,
            "error": None, "budget": {"requested": budget, "resolved": 5, "fraction": 1.0 if budget == "100%" else 0.05},
            "evidence_recall": {"any": None, "mean": None}, "bytes": {"full": 4000, "kept": 200, "peak": 4400},
        } | changes
        for i in range(CONTEXTS)
    ]  # fmt: skip


def claims(*parts: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    together = [row for part in parts for row in part]
    found = compare_all(together, summarise(together, resamples=200))
    return {(row["policy"], row["against"]): row for row in found}


def test_verdicts_follow_interval_and_adjusted_p() -> None:
    found = claims(
        rows("full", 1.0),
        rows("db_trim_kv", 0.95, seed=0),
        rows("keydiff", 0.5),
        rows("snapkv", 0.45),
        rows("random", 0.1),
    )
    assert found["db_trim_kv", "best baseline"]["verdict"] == BETTER
    assert found["db_trim_kv", "best baseline"]["reference"] == "keydiff"
    assert found["db_trim_kv", "full"]["verdict"] == OPEN
    assert found["keydiff", "full"]["verdict"] == WORSE
    assert found["snapkv", "best baseline"]["verdict"] == OPEN
    assert ("keydiff", "best baseline") not in found
    assert {k[0] for k in found} == {"db_trim_kv", "keydiff", "snapkv", "random"}
    raw = [row["p"] for row in found.values()]
    assert [row["p_holm"] for row in found.values()] == holm(raw)
    assert (found["db_trim_kv", "full"]["n"], found["db_trim_kv", "full"]["n_contexts"], found["db_trim_kv", "full"]["n_seeds"]) == (40, 40, 1)  # fmt: skip
    assert claims_text(list(found.values())).count("db_trim_kv against keydiff") == 1


def test_nothing_is_better_where_chance_eviction_is_inside_the_interval() -> None:
    found = claims(
        rows("full", 1.0), rows("db_trim_kv", 0.6, seed=0), rows("keydiff", 0.1), rows("random", 0.55, draw=0)
    )
    assert found["db_trim_kv", "best baseline"]["low"] > 0
    assert found["db_trim_kv", "best baseline"]["verdict"] == "no claim: random+protect is inside the interval"
    assert found["db_trim_kv", "full"]["verdict"] == WORSE


def test_shares_with_another_score_withhold_a_claim_from_gates_alone() -> None:
    parts = (rows("full", 1.0), rows("quota+keydiff", 0.75, seed=0), rows("keydiff", 0.1), rows("random", 0.05))
    found = claims(*parts, rows("db_trim_kv", 0.8, seed=0))
    assert found["db_trim_kv", "best baseline"]["verdict"] == "no claim: quota+keydiff is inside the interval"
    assert found["quota+keydiff", "best baseline"]["verdict"] == BETTER


def test_a_difference_that_many_comparisons_may_bring_about_is_none() -> None:
    near = rows("keydiff", 1.0)
    for row in near[:6]:
        row["score"] = 0.0
    few = claims(rows("full", 1.0), near)
    assert few["keydiff", "full"]["verdict"] == WORSE
    many = [rows(name, 1.0) for name in ("snapkv", "h2o", "knorm", "tova", "streaming_llm", "cake", "lagkv", "mixkv")]
    found = claims(rows("full", 1.0), near, *many)
    assert found["keydiff", "full"]["high"] < 0
    assert found["keydiff", "full"]["p"] < 0.05 <= found["keydiff", "full"]["p_holm"]
    assert found["keydiff", "full"]["verdict"] == OPEN


def test_seeds_are_paired_with_themselves_and_with_what_has_none() -> None:
    def cell(*seeds: int | None) -> Cell:
        scores = {(seed, c, 0): float(seed or 0) + c for seed in seeds for c in (0, 1)}
        return Cell("x", "global", scores, {0: "a", 1: "a"})

    matrix, clusters = gaps(cell(1, 2), cell(1, 2))
    assert matrix.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert clusters == ["a", "a"]
    assert gaps(cell(1, 2), cell(None))[0].tolist() == [[1.0, 1.0], [2.0, 2.0]]


def test_contexts_of_one_cluster_move_together() -> None:
    ones, zeros = np.ones(8), np.zeros(8)
    assert paired_p_value(ones, zeros) == pytest.approx(2 / 2**8, abs=0.003)
    assert paired_p_value(ones, zeros, clusters=list("aabbccdd")) == pytest.approx(2 / 2**4, abs=0.01)
    mixed = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    alone, joined = (paired_difference(mixed, zeros, clusters=own) for own in (None, list("aaaabbbb")))
    assert alone[0] == joined[0] == 0.5
    assert joined[2] - joined[1] == 1.0 > alone[2] - alone[1]


def test_baselines_are_heuristics_that_know_no_answer() -> None:
    assert is_baseline("snapkv")
    assert is_baseline("keydiff (run)")
    assert not any(map(is_baseline, ("full", "random", "oracle", "nothing")))
