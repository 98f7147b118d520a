"""The decoding benchmark in miniature: what it writes, the maths of its ratios, and its GPU part on a CPU."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DECODER = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    import torch

    monkeypatch.syspath_prepend(ROOT / "scripts")
    threads = torch.get_num_threads()
    yield import_module("bench_decode")
    torch.set_num_threads(threads)


@pytest.fixture
def told(bench):
    return import_module("decode_page")


@pytest.fixture
def caches(bench):
    return import_module("decode_caches")


def miniature(bench):
    return bench.Plan(
        decoder=DECODER, context=128, batch=2, budget="10%", threads=(1,), rounds=2, tokens=2, curve_contexts=(64, 128),
        curve_budgets=("10%", "100%"), curve_rounds=2, curve_tokens=1, cycles=1, prefill=128, prefill_threads=1,
        prefill_repeats=1, kept=(8, 32), bytes_batch=1, megabytes=1,
    )  # fmt: skip


def made_up(threads=1, **ms):
    where = {"part": "setting", "threads": threads, "context": 100, "batch": 2, "budget": "5%"}
    return [{**where, "variant": k, "ms": v, "ms_median": v, "noisy": False, "growth_ms": 1.0} for k, v in ms.items()]


def test_a_miniature_run_writes_rows_ratios_and_the_page(bench, told, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    plan = miniature(bench)
    monkeypatch.setattr(bench, "Plan", lambda: plan)
    monkeypatch.setattr(bench, "EVERY", 16)
    bench.main(["--out", str(tmp_path), "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {"rows", "ratios", "machine", "versions"}
    assert set(told.TARGETS) <= set(found["ratios"])
    assert all(isinstance(value, float) and value > -1 for value in found["ratios"].values())
    rows = found["rows"]
    assert {row["part"] for row in rows} == {"bandwidth", "setting", "curve", "evictions", "prefill", "bytes"}
    held = {row["variant"]: row for row in told.of(rows, "setting")}
    assert set(held) == {"dynamic", "static", "unlimited", "global", "uniform"}
    assert held["uniform"]["kept_min"] == held["uniform"]["kept_max"] == 13
    assert held["global"]["kept_min"] < 13 < held["global"]["kept_max"]
    assert [row["budget"] for row in told.of(rows, "curve", variant="global")] == ["10%", "100%"] * 2
    assert all(row["evictions"] == 1 and 0 < row["share"] < 1 for row in told.of(rows, "evictions"))
    spent = {row["policy"]: row for row in told.of(rows, "prefill")}
    assert all(row["evict_s"] > spent["full"]["evict_s"] for name, row in spent.items() if name != "full")
    assert {name for name, row in spent.items() if row["beside_s"]} == {"db_trim_kv", "snapkv", "h2o"}
    assert all(1 <= row["over"] <= row["over_decoding"] for row in told.of(rows, "bytes"))
    text = (tmp_path / "decode.md").read_text()
    assert all(f"`{name}`: " in text for name in told.TARGETS)
    assert "Not measured: no CUDA device was used." in text
    assert (tmp_path / "decode.png").stat().st_size > 10_000


def test_the_gpu_part_runs_on_any_device_and_notes_what_does_not_fit(bench, told):
    import torch

    plan = bench.GPUPlan(
        decoder=DECODER | {"tie_word_embeddings": True}, contexts=(64,), batches=(1, 4), budget="16", rounds=2, tokens=2,
        megabytes=1,
    )  # fmt: skip
    rows = bench.gpu(plan, torch.device("cpu"), memory=240_000)
    small, large = (told.of(rows, "gpu", batch=batch) for batch in (1, 4))
    assert all("ms" in row and row["bound_ms"] > 0 for row in small)
    assert {row["variant"] for row in large if "note" in row} == {"dynamic", "static", "unlimited"}
    assert {row["variant"] for row in large if "ms" in row} == {"global", "uniform"}
    limits = [row["bound_ms"] for row in small]
    assert limits[0] == limits[2] > limits[3] == limits[4]
    assert "does not fit in memory" in "\n".join(told._gpu(rows))
    assert told.ratios(rows).keys() >= {"gpu_speedup_over_fastest_full@64x1", "gpu_global_over_uniform@64x4"}
    assert "gpu_speedup_over_fastest_full@64x4" not in told.ratios(rows)


def test_ratios_are_against_the_fastest_full_cache_and_the_worst_number_of_threads(told):
    rows = made_up(1, dynamic=8.0, static=5.0, unlimited=6.0, **{"global": 2.0}, uniform=1.0)
    values = told.ratios(rows)
    assert values["speedup_over_fastest_full"] == 2.5
    assert values["speedup_over_fastest_full_with_growth"] == 6 / 3
    assert values["unlimited_over_dynamic"] == 0.75
    assert values["global_over_uniform"] == 2
    values = told.ratios(rows + made_up(2, dynamic=5.0, static=9.0, unlimited=4.0, **{"global": 2.0}, uniform=2.0))
    assert (values["speedup_over_fastest_full"], values["speedup_over_fastest_full@1_threads"]) == (2, 2.5)
    assert (values["unlimited_over_dynamic"], values["global_over_uniform"]) == (0.8, 2)
    assert told.summary({"eviction_share": 0.06, "speedup_over_fastest_full": 3.0}).splitlines() == [
        "met    3.000  speedup_over_fastest_full", "NOT    0.060  eviction_share",
    ]  # fmt: skip


def test_shares_quote_the_larger_of_two_measurements(told):
    row = {"part": "prefill", "policy": "db_trim_kv", "share_noted": 0.02, "share_paired": -0.01}
    assert told.ratios([row])["prefill_share"] == 0.02
    assert told.ratios([row | {"share_paired": 0.07}])["prefill_share"] == 0.07


def test_timings_far_apart_are_marked(caches, told):
    assert caches.cell([2.0, 1.0, 4.0], "ms") == {"ms": 1.0, "ms_median": 2.0, "noisy": True}
    assert told.timed(caches.cell([2.0, 1.0, 4.0], "ms")) == "1.00 (2.00) noisy"
    assert not caches.cell([1.0, 1.2, 4.0], "ms")["noisy"]


def test_full_caches_that_do_not_fit_together_are_timed_one_after_the_other(bench, caches, told):
    import torch

    plan = replace(miniature(bench), curve_contexts=(64,), curve_budgets=("10%",))
    rows = bench.curve(caches.Bench(DECODER, torch.device("cpu"), 2**17), plan)
    assert [row.get("by_turns") for row in rows] == [False, False, False, None]
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda"])
