"""Two processes train the gates that one would with all rows; sweeps and clusters start from configs."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from retention.config import compose
from retention.training import devices
from retention.training.export import export_checkpoint
from retention.training.run import run
from retention.types import LossTerms
from tests.training.test_resume import ROOT, SETTINGS, environment, gates

EXACT = ["objective.queries=0"]


def train(*more):
    command = [sys.executable, "train.py", *SETTINGS, "trainer.max_steps=3", "trainer.val_every=3", *more]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def alone(folder, *more):
    """The same in this process."""
    run(compose("train", [*SETTINGS, "trainer.max_steps=3", "trainer.val_every=3", f"output_dir={folder}", *more]))
    return gates(folder)


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=1e-6, rtol=1e-5), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Gates of one process with all rows in one batch."""
    return alone(tmp_path_factory.mktemp("whole") / "run", "data.batch_size=4", *EXACT)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(("strategy", "parts"), [("ddp", 2), ("fsdp", 1)])
def test_two_processes_equal_one_with_all_rows(strategy, parts, whole, tmp_path):
    """With accumulated batches too. And what they leave is anyone's: one process exports the checkpoint, and goes on from it."""
    apart = tmp_path / "two"
    cut = [f"data.batch_size={2 // parts}", f"trainer.accumulate={parts}", "trainer.devices=2"]
    said = train(f"output_dir={apart}", f"trainer.strategy={strategy}", *cut, *EXACT)
    assert said.count("gates:") == 1
    assert f"evaluate them: python eval.py gates={apart}/gates task.ask_subset." in said
    same(whole, gates(apart))
    (checkpoint,) = apart.glob("checkpoints/*.ckpt")
    assert checkpoint.stem == "step=2"
    last = export_checkpoint(checkpoint, tmp_path / "last", which="last")
    assert load_file(last / "gate_model.safetensors").keys() == whole.keys()
    cost = json.loads((apart / "gates" / "gate_config.json").read_text())["training"]["cost"]
    assert cost["rows"] == 3 * 4
    shutil.rmtree(apart / "gates")
    run(compose("train", [*SETTINGS, "trainer.max_steps=3", "trainer.val_every=3", f"output_dir={apart}", f"resume={apart}", "data.batch_size=4", *EXACT]))  # fmt: skip
    same(whole, gates(apart))


def test_accumulated_batches_are_one_large_batch(whole, tmp_path):
    same(whole, alone(tmp_path / "run", "data.batch_size=2", "trainer.accumulate=2", *EXACT))
    same(whole, alone(tmp_path / "more", "data.batch_size=1", "trainer.accumulate=4", *EXACT))


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


def test_accumulated_parts_share_the_counts_of_all():
    """Totals 6 and 8 over 3 and 1 counted rows, one batch after the other."""
    ahead, weights = {"kl": 4.0}, {"kl": 1.0}
    parts = [LossTerms({"kl": (torch.tensor(t), torch.tensor(c))}, weights) for t, c in ((6.0, 3.0), (8.0, 1.0))]
    losses = [float(devices.across_ranks(part, ahead, 2).loss()) for part in parts]
    assert sum(losses) / 2 == (6 + 8) / 4


WRONG = [("strategy", "ddp_spawn"), ("devices", 0), ("num_nodes", 0), ("accumulate", 0), ("picture_every", 0)]


@pytest.mark.parametrize(("field", "bad"), WRONG)
def test_what_is_not_known_is_named(field, bad):
    with pytest.raises(ValueError, match=f"expected trainer.{field} .* got '?{bad}"):
        compose("train", [f"trainer.{field}={bad}"])


REFUSED = [
    (["trainer.strategy=fsdp", "model.quantization=8bit"], "shares out whole weights, got model.quantization=8bit"),
    (["trainer.strategy=fsdp", "memory=delta"], "a base that is held whole, got .* trainer.strategy=fsdp"),
    (["trainer.accumulate=2", "memory=delta"], "one batch per step .* got trainer.accumulate=2"),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_what_does_not_go_together_is_refused(overrides, words):
    with pytest.raises(ValueError, match=words):
        compose("train", overrides)


def test_deepspeed_is_lightnings_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package deepspeed; install it"):
        devices.strategy("deepspeed")
    monkeypatch.setattr(devices, "find_spec", lambda name: object())
    assert [devices.strategy(x) for x in ("deepspeed", "fsdp", "auto")] == ["deepspeed", "ddp", "auto"]


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
