"""What is called better: paired, adjusted for all comparisons, and never within reach of chance eviction."""

from typing import Any

import numpy as np
import pytest

from retention.evaluation.claims import BETTER, OPEN, WORSE, Cell, compare_all, gaps, is_baseline, weakness
from retention.evaluation.statistics import gap_to_best, holm, paired_difference, paired_p_value, summarise
from retention.evaluation.tables import claims_text, difference_text

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
    assert (found["keydiff", "best baseline"]["reference"], found["keydiff", "best baseline"]["verdict"]) == (
        "snapkv",
        OPEN,
    )
    assert (found["random", "best baseline"]["n_references"], found["keydiff", "best baseline"]["n_references"]) == (
        2,
        1,
    )
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

    matrix, shared = gaps(cell(1, 2), cell(1, 2))
    assert matrix.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert shared == 4
    assert gaps(cell(1, 2), cell(None))[0].tolist() == [[1.0, 1.0], [2.0, 2.0]]


def test_contexts_of_one_cluster_move_together() -> None:
    ones, zeros = np.ones(8), np.zeros(8)
    assert paired_p_value(ones, zeros) == pytest.approx(2 / 2**8, abs=0.003)
    assert paired_p_value(ones, zeros, clusters=list("aabbccdd")) == pytest.approx(2 / 2**4, abs=0.01)
    mixed = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    alone, joined = (paired_difference(mixed, zeros, clusters=own) for own in (None, list("aaaabbbb")))
    assert alone[0] == joined[0] == 0.5
    assert joined[2] - joined[1] == 1.0 > alone[2] - alone[1]


def test_nothing_is_better_where_chance_eviction_is_above_it_or_was_not_run() -> None:
    parts = (rows("full", 1.0), rows("db_trim_kv", 0.6, seed=0), rows("keydiff", 0.1))
    above = claims(*parts, rows("random", 0.9))["db_trim_kv", "best baseline"]
    assert above["p_holm"] < 0.05
    assert above["low"] > 0
    assert above["verdict"] == "no claim: random+protect is above the interval"
    assert claims(*parts)["db_trim_kv", "best baseline"]["verdict"] == "no claim: random+protect was not run"
    renamed = claims(*parts, rows("random (two)", 0.55))["db_trim_kv", "best baseline"]
    assert renamed["verdict"] == "no claim: random+protect (two) is inside the interval"
    assert claims(*parts, rows("random (two)", 0.05))["db_trim_kv", "best baseline"]["verdict"] == BETTER


def test_among_equals_the_best_one_is_rarely_called_better_than_the_others() -> None:
    rng, told = np.random.default_rng(0), {"resamples": 400, "flips": 400}
    worse, chosen = 0, 0
    for seed in range(150):
        one, others = rng.random(40) < 0.5, rng.random((12, 40)) < 0.5
        gap = gap_to_best((one * 1.0 - others)[:, None], seed=seed, **told)
        worse += gap.p < 0.05 and gap.high < 0
        best = others[others.mean(axis=1).argmax()] * 1.0
        chosen += paired_p_value(one * 1.0, best, flips=400, seed=seed) < 0.05
    assert worse / 150 < 0.05 < 0.08 < chosen / 150


def test_the_gap_to_the_best_of_one_is_the_paired_difference() -> None:
    one, other = np.random.default_rng(0).integers(2, size=(2, 30)) * 1.0
    labels = [i // 2 for i in range(30)]
    for a, b in ((one, other), (other, one)):
        gap = gap_to_best((a - b)[None, None], clusters=labels)
        assert gap[1:4] == pytest.approx(paired_difference(a, b, clusters=labels))
        assert gap.p == pytest.approx(paired_p_value(a, b, clusters=labels))


def test_better_than_the_best_is_better_than_each() -> None:
    rng = np.random.default_rng(0)
    one = np.ones(30)
    near, noisy = (rng.random((2, 30)) > [[0.5], [0.6]]) * 1.0
    noisy[:3] = np.nan
    gap = gap_to_best(np.stack([one - near, one - noisy])[:, None])
    alone = [paired_difference(one, other) for other in (near, noisy)]
    assert gap.low == pytest.approx(min(low for _, low, _ in alone))
    assert gap.difference == min(mean for mean, _, _ in alone)
    assert gap.p == pytest.approx(max(paired_p_value(one, other) for other in (near, noisy)), abs=1e-3)


def test_a_large_table_draws_signs_enough_for_its_own_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retention.evaluation.claims.FLIPS", 20)
    found = claims(rows("full", 1.0), rows("db_trim_kv", 0.95, seed=0), rows("keydiff", 0.3), rows("random", 0.1))
    assert found["db_trim_kv", "best baseline"]["verdict"] == BETTER


def test_a_table_says_where_it_is_too_small_to_say_anything() -> None:
    found = claims(*(rows(name, 1.0)[:6] for name in ("full", "keydiff", "random")))
    assert "3 of 3 comparisons rest on so few contexts" in str(weakness(list(found.values())))
    assert "that takes 7 contexts" in str(weakness(list(found.values())))
    assert 2.0 ** (1 - 7) * 3 < 0.05 <= 2.0 ** (1 - 6) * 3
    assert weakness(list(claims(rows("full", 1.0), rows("keydiff", 0.5), rows("random", 0.1)).values())) is None


def test_one_cluster_has_no_interval_and_no_verdict() -> None:
    found = claims(*(rows(n, r, cluster="a") for n, r in (("full", 1.0), ("keydiff", 0.2), ("random", 0.1))))
    lost = found["keydiff", "full"]
    assert (lost["low"], lost["high"], lost["verdict"], lost["n_clusters"]) == (None, None, OPEN, 1)
    assert difference_text(lost) == "-80.0"
    assert summarise(rows("keydiff", 0.2, cluster="a"))[0]["ci_low"] is None


def test_answers_of_one_alone_are_not_counted_as_compared() -> None:
    found = claims(rows("full", 1.0)[:10], rows("keydiff", 0.5), rows("random", 0.1))
    assert (found["keydiff", "full"]["n"], found["keydiff", "full"]["n_contexts"]) == (10, 10)


def test_a_score_that_is_no_number_is_refused() -> None:
    broken = rows("keydiff", 0.5)
    broken[3]["score"] = float("nan")
    with pytest.raises(ValueError, match="expected a finite score, got nan for c3 under keydiff"):
        claims(rows("full", 1.0), broken)


def test_baselines_are_heuristics_that_know_no_answer() -> None:
    assert is_baseline("snapkv")
    assert is_baseline("keydiff (run)")
    assert not any(map(is_baseline, ("full", "random", "oracle", "nothing", "db_trim_kv")))
