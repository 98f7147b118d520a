"""Runs are tracked offline without an account, and without wandb at all."""

import json
import sys
import time

import pytest
import torch


@pytest.fixture
def tracking(tmp_path, monkeypatch):
    from retention.training.loggers import Tracking

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return lambda kind: Tracking(kind, tmp_path, "run", {"seed": 0}, 0)


def test_wandb_offline_keeps_histograms_table_and_artefact(tracking, tmp_path):
    (tmp_path / "gates").mkdir()
    (tmp_path / "gates" / "gate_config.json").write_text(json.dumps({"a": 1}))
    logs = tracking("wandb")
    logs.histogram(torch.randn(2, 50), 3)
    logs.finish([{"scope": "global", "budget": "5%", "accuracy": 0.5}], tmp_path / "gates")
    written = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(written) == 1
    deadline = time.monotonic() + 20
    while b"half_life/layer1" not in (content := written[0].read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for expected in (b"half_life/layer1", b"validation under hard eviction", b"gates"):
        assert expected in content


def test_without_wandb_csv_is_used_and_one_line_says_so(tracking, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    logs = tracking("wandb")
    assert [type(x).__name__ for x in logs.loggers] == ["CSVLogger"]
    assert "wandb is not installed" in caplog.text


def test_csv_alone_starts_no_wandb(tracking, tmp_path):
    tracking("csv").finish([], tmp_path)
    assert not list(tmp_path.glob("wandb"))


def test_a_whole_run_is_tracked_offline_without_an_account(tmp_path, monkeypatch):
    import wandb

    from retention.config import compose
    from retention.training.run import run
    from tests.training.test_lagrangian import SMALL

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    added, add = [], wandb.Artifact.add_dir

    def noting(self, folder, name=None):
        added.append((folder, name))
        return add(self, folder, name)

    monkeypatch.setattr(wandb.Artifact, "add_dir", noting)
    more = ["logger=wandb", "trainer.picture_every=2", "trainer.lora_rank=2", f"output_dir={tmp_path / 'run'}"]
    artefact = run(compose("train", [*SMALL, *more]))
    (written,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    content = written.read_bytes()
    for expected in (b"cost/forwards", b"survival", b"val/hard_accuracy", b"half_life/layer1", b"global_5%"):
        assert expected in content, expected
    assert added == [(str(artefact), None), (str(tmp_path / "run" / "adapter"), "adapter")]
    assert list((tmp_path / "run").glob("wandb/offline-run-*/files/media/images/survival*.png"))
