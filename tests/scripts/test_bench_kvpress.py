"""The kvpress benchmark without kvpress: our side's worker, ratios, page and refusals."""

import io
import json
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROMPT, NEW = 192, 4
SHAPE = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("bench_kvpress")


@pytest.fixture
def shared(bench):
    return import_module("kvpress_worker")


@pytest.fixture
def ours(bench, tmp_path):
    bench.write_inputs(tmp_path, bench.SHAPE | SHAPE, PROMPT)
    return bench.Ours(tmp_path)


def made_up(bench, prompt=100):
    rows = bench.plan(prompt)
    for number, row in enumerate(rows):
        size = 1000 * (1 + number) * row["asked"]
        row |= {
            "kept": 8 * row["asked"],
            "kept_least": 1,
            "kept_most": row["asked"],
            "bytes": size,
            "peak_bytes": 2 * size,
        }
        row |= {"bytes_after_decode": size, "beside_bytes": 0}
        for name in ("prefill_s", "decode_ms"):
            row |= {name: 1.0 + number, f"{name}_median": (1.0 + number) * (2 if number == 0 else 1.1)}
    return rows


def test_our_side_keeps_what_is_asked(bench, ours):
    held = {}
    for row in bench.plan(PROMPT):
        if row["side"] == "retention":
            trace = f"{row['method']}_{row['asked']}.safetensors"
            asked = {"method": row["method"], "prompt": PROMPT, "kept": row["asked"], "new_tokens": NEW, "trace": trace}
            done = ours({"do": "run", **asked})
            assert done["kept"] == 2 * 2 * row["asked"]
            assert len(done["tokens"]) == NEW
            assert done["peak_bytes"] >= done["bytes"]
            assert done.get("ledger_bytes", done["bytes"]) == pytest.approx(done["bytes"], rel=0.02)
            held[row["method"], row["keep"]] = done
    entry = 2 * 16 * 4
    assert held["full", 1.0]["bytes"] == PROMPT * 2 * 2 * entry
    assert held["knorm", 0.1]["bytes"] < 0.2 * held["full", 1.0]["bytes"]
    assert held["knorm_global", 0.1]["kept_most"] > held["knorm_global", 0.1]["kept_least"] >= int(0.2 * 19)
    assert bench.compared(
        *({**held[m, 1.0], "trace": f"{m}_{PROMPT}.safetensors"} for m in ("full", "full_own")), ours.folder
    ) == {"difference": pytest.approx(0, abs=1e-5), "tokens": NEW, "of": NEW}


def test_our_side_behaves_in_the_checks(ours):
    found = ours({"do": "checks"})
    assert found["padded_difference"] < 1e-4
    assert found["positions_difference"] < 1e-4
    assert (found["padded_kept"], found["chunked_kept"], found["follow_up"]) == (20, 64, "ran")


def test_workers_answer_lines_and_errors(shared):
    replies = io.StringIO()
    shared.serve(lambda request: {"double": 2 * request["x"]}, ['{"x": 2}', '{"y": 2}', "{"], replies)
    first, second, third = (json.loads(line) for line in replies.getvalue().splitlines())
    assert first == {"double": 4}
    assert "KeyError" in second["error"]
    assert "JSONDecodeError" in third["error"]


def test_bytes_count_every_storage_once(shared):
    import torch

    class Slotted:
        __slots__ = ("inside",)

    whole, slotted = torch.zeros(100), Slotted()
    slotted.inside = {"again": whole[10:20], "own": [torch.zeros(3, dtype=torch.int64)]}
    assert shared.held_bytes([whole, (slotted, torch.nn.Linear(4, 4))]) == 400 + 24


def test_the_worker_needs_no_retention():
    text = (ROOT / "scripts" / "kvpress_worker.py").read_text()
    assert "import retention" not in text
    assert "from retention" not in text


def test_ratios_are_ours_over_theirs(bench):
    rows = made_up(bench)
    values = bench.ratios(rows)
    theirs, mine = bench.of(rows, "kvpress", "knorm", 0.1), bench.of(rows, "retention", "knorm", 0.1)
    assert values["bytes_ours_over_kvpress_uniform@10%"] == mine["bytes"] / theirs["bytes"]
    assert values["ms_ours_over_kvpress_uniform@10%"] == mine["decode_ms"] / theirs["decode_ms"]
    assert {name.split("_ours_over_")[1] for name in values} == {
        "kvpress_uniform@50%", "kvpress_uniform@10%", "kvpress_adaptive@50%", "kvpress_adaptive@10%", "stock_full",
    }  # fmt: skip
    theirs["error"] = "no"
    del theirs["bytes"]
    assert "bytes_ours_over_kvpress_uniform@10%" not in bench.ratios(rows)
    said = import_module("kvpress_page").behind(
        {"bytes_ours_over_kvpress_uniform@10%": 0.5, "ms_ours_over_kvpress_uniform@10%": 1.5}
    )
    assert said == ["- uniform eviction, 10% kept: decode time per token 1.50 times theirs."]


def test_unequal_entries_stop(bench):
    rows = made_up(bench)
    bench.check_kept(rows)
    bench.of(rows, "retention", "knorm", 0.5)["kept"] += 10
    with pytest.raises(ValueError, match="expected equal entries at 50%"):
        bench.check_kept(rows)


def test_the_page_says_what_ran(bench):
    rows = made_up(bench)
    bench.of(rows, "kvpress", "adakv_knorm", 0.1)["error"] = "ValueError: no hyperplane"
    theirs = {"padded_difference": 1.0, "padded_difference_full": 0.0, "padded_kept": 32, "padded_kept_padding": 0.4, "chunked_kept": 96, "positions_difference": 2.0, "follow_up": "ran"}  # fmt: skip
    versions = {"python": "3.11", "torch": "2", "transformers": "5"}
    text = bench.page(
        {
            "rows": rows,
            "ratios": bench.ratios(rows),
            "machine": {"cpu": "a processor", "system": "Linux"},
            "versions": {
                "kvpress": versions | {"kvpress": "0.5.5"},
                "retention": versions | {"retention": "0.1", "git": "0" * 40, "git_dirty": "false"},
            },
            "config": {
                "command": "python ...",
                "prompt": 100,
                "distinct": 99,
                "new_tokens": 4,
                "repeats": 5,
                "model": bench.SHAPE,
            },
            "full_difference": 0.0,
            "agreement": {"uniform@50%": {"difference": 1e-6, "tokens": 4, "of": 4}, "adaptive@50%": {"error": "no"}},
            "checks": {"kvpress": theirs, "retention": {"error": "no"}},
            "date": "2000-01-01",
        }
    )
    assert "could not be run: ValueError: no hyperplane" in text
    assert "(2.00) unsteady" in text
    assert "| 96 | could not be run: no |" in text
    assert "## Where this package does not lead\n\n- uniform eviction" in text


def test_full_caches_that_differ_stop(bench, tmp_path):
    import torch
    from safetensors.torch import save_file

    class Fixed:
        log = tmp_path / "log"

        def __init__(self, value):
            self.value = value

        def ask(self, *, file, **_):
            save_file({"logits": torch.full((2, 3), self.value)}, tmp_path / file)
            return {}

    assert bench.check_full({"kvpress": Fixed(1.0), "retention": Fixed(1.0)}, tmp_path, 4) == 0
    with pytest.raises(ValueError, match="do not run the same model"):
        bench.check_full({"kvpress": Fixed(1.0), "retention": Fixed(2.0)}, tmp_path, 4)


def test_environments_are_reused_refused_or_explained(bench, tmp_path, monkeypatch, capsys):
    done = tmp_path / "done"
    (done / "bin").mkdir(parents=True)
    (done / "bin" / "python").touch()
    (done / bench.STAMP).write_text(json.dumps(bench.wanted()))
    assert bench.environment(done) == done / "bin" / "python"

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(ValueError, match="was not made by this script"):
        bench.environment(tmp_path / "mine")
    assert (tmp_path / "mine" / "file").exists()

    def offline(words, **_):
        raise subprocess.CalledProcessError(1, words, stderr="WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(bench.subprocess, "run", offline)
    for _ in range(2):  # the second attempt starts over in the folder of the first
        with pytest.raises(ValueError, match=r"could not be built in .* \(ERROR: No matching distribution\)"):
            bench.environment(tmp_path / "new")
    assert "some minutes once" in capsys.readouterr().err
