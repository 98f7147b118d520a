"""The benchmark of gated attention in miniature: it measures what its page says, never a time."""

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    try:
        yield import_module("bench_gated_attention")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def measures(bench):
    plan = replace(bench.QUICK, lengths=(128,), far=(700,), timed=(64, 128))
    parts = ("age_terms", "errors", "far_errors", "speeds")
    return plan, dict(
        zip(("age_terms", "errors", "far", "speeds"), (getattr(bench, x)(plan) for x in parts), strict=True)
    )


def test_the_age_term_is_what_the_page_says(measures):
    for row in measures[1]["age_terms"]:
        assert row["split"] <= row["bound"]
        assert row["recentred"] <= row["recentred_bound"]
    fast = next(row for row in measures[1]["age_terms"] if row["span"] == 4096 and row["half_life"] == 1)
    assert fast["unsplit"] > 100 * fast["split"]


def test_errors_are_told_apart(measures):
    rows = {row["form"]: row for row in measures[1]["errors"]}
    assert set(rows) == {"noise", "fp32", "split", "bias", "unsplit", "flex"}
    assert rows["fp32"]["out"] < 1e-4 < rows["split"]["out"]
    assert max(rows["split"][name] for name in ("q", "k", "v", "log_beta")) < 0.01
    assert "q" not in rows["flex"]


def test_the_last_queries_are_those_of_the_whole_form(bench, monkeypatch):
    """Of a row attended in calls of 300 queries, the 64 last."""
    for module in (bench, bench.split):
        monkeypatch.setattr(module, "QUERIES", 300)
    plan = bench.QUICK
    q, k, v, log_beta = bench.drawn(plan, 700, 10.0, heads=2)
    where = {"scaling": 0.2, "positions": bench.torch.arange(700)[None]}
    whole = bench.split.split_gated_attention(q, k, v, log_beta, **where)
    late = bench.late_split(q[:, :, -64:], k, v, log_beta, **where)
    assert (whole[:, :, -64:] - late).abs().max() <= 0.01


def test_the_page_has_every_row_and_says_what_was_missed(bench, measures):
    plan, found = measures
    text = bench.page(plan, found)
    assert all(f"| {tokens} |" in text for tokens in plan.timed)
    assert text.count("| 4,096 |") == 2
    assert "on a GPU: not measured" in text
    for row in found["speeds"]:
        assert row["bytes"] > 0
        row["over_plain"] = 1.5
    assert "1.50, missed" in bench.page(plan, found)
