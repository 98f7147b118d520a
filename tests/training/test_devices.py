"""Two processes train the gates that one would with all rows; sweeps and clusters start from configs."""

import subprocess
import sys

import pytest
import torch

from retention.config import compose
from retention.training import devices
from retention.types import LossTerms
from tests.training.test_resume import ROOT, SETTINGS, environment, gates

EXACT = ["objective.capacity_queries=null"]


def train(*more):
    command = [sys.executable, "train.py", *SETTINGS, "trainer.max_steps=3", "trainer.val_every=3", *more]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_equal_one_with_all_rows(tmp_path):
    whole, apart = tmp_path / "one", tmp_path / "two"
    exact = ["objective.queries=100000"]
    train(f"output_dir={whole}", "data.batch_size=4", *exact)
    said = train(f"output_dir={apart}", "data.batch_size=2", "trainer.devices=2", "trainer.strategy=ddp", *exact)
    assert said.count("gates:") == 1
    one, two = gates(whole), gates(apart)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=1e-6, rtol=1e-5), name
    assert len(list(apart.glob("checkpoints/*.ckpt"))) == 1


def test_means_are_over_all_processes(monkeypatch):
    """Two processes with 3 and 1 counted rows: the mean of their losses is the loss of all four."""
    mine = LossTerms({"kl": (torch.tensor(6.0), torch.tensor(3.0))}, {"kl": 2.0})
    assert devices.across_ranks(mine) is mine

    def both(counts):
        counts.add_(torch.tensor([1.0], dtype=counts.dtype))

    monkeypatch.setattr(devices, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", both)
    assert devices.across_ranks(mine).loss() == 2 * 6 / 2
    whole = (6.0 + 8.0) / 4
    other = LossTerms({"kl": (torch.tensor(8.0), torch.tensor(2.0))}, {"kl": 1.0}, least=0.5).loss()
    assert (float(devices.across_ranks(mine).loss()) / 2 + float(other)) / 2 == whole


def test_a_count_of_nothing_anywhere_is_no_loss(monkeypatch):
    monkeypatch.setattr(devices, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: None)
    none = LossTerms({"kl": (torch.tensor(0.0), torch.tensor(0.0))}, {"kl": 1.0})
    assert devices.across_ranks(none).loss() == 0


@pytest.mark.parametrize(("field", "bad"), [("strategy", "ddp_spawn"), ("devices", 0), ("num_nodes", 0)])
def test_what_is_not_known_is_named(field, bad):
    with pytest.raises(ValueError, match=f"expected trainer.{field} .* got '?{bad}"):
        compose("train", [f"trainer.{field}={bad}"])


def test_a_process_that_was_started_writes_where_the_first_does(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "rank", lambda: 1)
    monkeypatch.setenv(devices.FOLDER, str(tmp_path / "first"))
    assert devices.settle(compose("train", [])).output_dir == str(tmp_path / "first")
    assert devices.settle(compose("train", [f"resume={tmp_path / 'x'}"])).resume == str(tmp_path / "first")


def test_auto_resumes_what_is_there(monkeypatch, tmp_path):
    monkeypatch.delenv(devices.FOLDER, raising=False)
    folder = tmp_path / "run"
    assert devices.settle(compose("train", ["resume=auto", f"output_dir={folder}"])).resume is None
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert devices.settle(compose("train", ["resume=auto", f"output_dir={folder}"])).resume == str(folder)
