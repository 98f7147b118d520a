"""Train, export, evaluate, report: the whole line in one short run, and what a user sees when it is broken."""

import csv
import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch

SMALL = ["task.n_images=4", "task.n_needles=12", "task.n_asked=6", "task.n_turns=4"]
FIELDS = [
    "task",
    "policy",
    "scope",
    "protocol",
    "budget_fraction",
    "n",
    "accuracy",
    "ci_low",
    "ci_high",
    "full_accuracy",
    "retention",
    "accuracy_first_turn",
    "accuracy_later_turns",
    "kept_fraction",
    "kv_bytes_full",
    "kv_bytes_kept",
    "kv_bytes_peak",
    "seed",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from retention.config import compose
    from retention.training.run import run

    folder = tmp_path_factory.mktemp("train") / "run"
    overrides = ["trainer=smoke", "data.batch_size=2", "data.val_examples=2", "data.n_turns=4", *SMALL]
    return run(compose("train", [*overrides, "logger=csv", f"output_dir={folder}"]))


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    from retention.config import compose
    from retention.evaluation.run import run

    folder = tmp_path_factory.mktemp("eval") / "run"
    small = [word.replace("task.", "task.ask_subset.") for word in SMALL]
    overrides = [
        f"gates={trained}", "policies=[db_trim_kv,trim_kv,quota+keydiff,snapkv,random]", "budgets=[25%,10%]", "examples=4",
        "batch_size=2", "quota_examples=2", "protocols=[agnostic,aware,packed,streaming]", *small,
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["/usr/bin/eval.py", *overrides, f"output_dir={folder}"])
        run(compose("eval", sys.argv[1:]))
    return folder, overrides


def test_training_leaves_an_artefact_a_log_and_a_checkpoint_without_backbone(trained):
    run = trained.parent
    files = {"gate_config.json", "gate_model.safetensors", "README.md", "accuracy.png"}
    assert {f.name for f in trained.iterdir()} == files
    rows = list(csv.DictReader((run / "csv" / "metrics.csv").read_text().splitlines()))
    assert any(row.get("loss/kl") for row in rows)
    checkpoint = torch.load(next((run / "checkpoints").glob("*.ckpt")), weights_only=True)  # noqa: TID251
    assert checkpoint["state_dict"]
    assert all(name.startswith("gates.") for name in checkpoint["state_dict"])


def test_the_summary_has_a_row_for_every_cell(evaluated):
    folder, _ = evaluated
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    assert len(rows) == 4 * (1 + 5 * 2)
    for row in rows:
        assert set(FIELDS) <= set(row)
        assert row["n"] == 16
        assert row["scope"] in ("per_head", "global")
    for row in rows:
        if row["policy"] != "full":
            assert row["kv_bytes_kept"] < 0.4 * row["kv_bytes_full"]
            assert row["kept_fraction"] == pytest.approx(row["budget_fraction"], rel=0.02)


def test_streaming_never_holds_the_whole_context(evaluated):
    folder, _ = evaluated
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    for row in rows:
        if "chunked" in row["protocol"] and row["policy"] in ("db_trim_kv", "trim_kv"):
            assert row["kv_bytes_peak"] < row["kv_bytes_full"]


def test_pictures_report_and_manifest_are_written(evaluated):
    folder, _ = evaluated
    pictures = (
        "curves",
        "pareto",
        "deferred",
        "depth",
        "survival",
        "survival_kinds",
        "allocation",
        "distance",
        "recall",
        "bytes",
        "places",
        "half_lives",
        "patches",
    )
    for name in pictures:
        assert (folder / f"{name}.png").stat().st_size > 5000
    page = (folder / "report.html").read_text()
    assert page.count("<figure>") == len(pictures)
    assert page.count('<details class="context"') == 2
    assert page.count('<details class="kept"') == 2 * 2 * 5
    assert 'src="http' not in page
    for name in ("summary.csv", "claims.csv", "table.md", "table.tex", "report.md"):
        assert (folder / name).stat().st_size > 100
    manifest = (folder / "manifest.json").read_text()
    assert {"config", "versions", "hardware", "command", "caveats"} <= set(json.loads(manifest))
    assert json.loads(manifest)["command"].startswith("python eval.py gates=.../gates 'policies=[db_trim_kv,")
    assert not re.search(r"""["\s=,']/\w""", manifest)  # no path from the root
    assert json.loads(manifest)["over_budget"] == 0


def test_the_documentation_names_every_field_of_a_row(evaluated):
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    rows = page.split("## Rows")[1].split("## Intervals")[0]
    documented = {name for cell in re.findall(r"(?m)^\| (`.*?) \|", rows) for name in re.findall(r"`(\w+)`", cell)}
    folder, _ = evaluated
    row = json.loads((folder / "examples.jsonl").read_text().splitlines()[0])
    assert set(row) == documented - {"judge"}


def without_times(folder):
    """What a run's summary says, but for how long its answers took."""
    told = json.loads((folder / "summary.json").read_text())
    for row in told["rows"]:
        assert row.pop("ms_prefill") > 0 < row.pop("ms_decode_per_token")
    return told


@pytest.mark.usefixtures("unrendered")
def test_a_stopped_evaluation_goes_on_where_it_was(evaluated):
    from retention.config import compose
    from retention.evaluation.run import run

    folder, overrides = evaluated
    before = without_times(folder)
    rows = (folder / "examples.jsonl").read_text().splitlines(keepends=True)
    (folder / "examples.jsonl").write_text("".join(rows[: len(rows) // 2]) + rows[-1][:40])
    run(compose("eval", [*overrides, f"output_dir={folder}"]))
    assert without_times(folder) == before
    manifest = json.loads((folder / "manifest.json").read_text())
    assert 0 < manifest["rows_reused"] < len(rows)


def test_missing_gates_and_other_settings_are_refused_in_one_sentence(tmp_path, evaluated):
    from retention.config import compose
    from retention.evaluation.run import run

    folder, overrides = evaluated
    with pytest.raises(ValueError, match=r"expected a gate artefact with gate_config.json in .*nowhere"):
        run(compose("eval", [f"gates={tmp_path / 'nowhere'}", f"output_dir={tmp_path / 'a'}"]))
    with pytest.raises(ValueError, match="need trained gates"):
        run(compose("eval", ["gates=null", f"output_dir={tmp_path / 'b'}"]))
    with pytest.raises(ValueError, match="holds results with seed = 0, this run has 3"):
        run(compose("eval", [*overrides, "seed=3", f"output_dir={folder}"]))


def test_a_folder_of_other_settings_is_refused_by_the_one_that_differs(tmp_path):
    from retention.config import compose
    from retention.evaluation.run import claim

    told = compose("eval", ["gates=null"])
    claim(tmp_path, told)
    file = tmp_path / "config.json"
    before = json.loads(file.read_text())
    before["task"].pop("recall")  # a preset that came later
    file.write_text(json.dumps(before))
    claim(tmp_path, compose("eval", ["gates=null", "tasks=[recall]"]))
    with pytest.raises(
        ValueError, match=r"holds results with task.needles.n_turns = 8, this run has 3; choose another"
    ):
        claim(tmp_path, compose("eval", ["gates=null", "task.needles.n_turns=3"]))


@pytest.mark.usefixtures("unrendered")
def test_heuristics_need_no_gates(tmp_path):
    from retention.config import compose
    from retention.evaluation.run import run

    small = [word.replace("task.", "task.ask_subset.") for word in SMALL]
    result = run(
        compose(
            "eval", ["gates=null", "policies=[keydiff]", "budgets=[16]", "examples=2", f"output_dir={tmp_path}", *small]
        )
    )
    assert [row["policy"] for row in result.summary] == ["full", "keydiff", "random"]
    assert logging.getLogger("retention").name == "retention"
