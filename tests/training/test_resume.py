"""A run killed at any moment continues with the same settings and ends with bitwise the same gates."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "trainer=smoke", "trainer.max_steps=8", "trainer.val_every=4", "trainer.save_every=2", "data.batch_size=2",
    "data.val_examples=2", "logger=csv", "task.n_images=4", "task.n_needles=12", "task.n_asked=6", "task.n_turns=4",
    "data.n_turns=4",
]  # fmt: skip


def command(*more: str) -> list[str]:
    return [sys.executable, "train.py", *SETTINGS, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def finish(*more: str) -> None:
    """A run to its end, in this process: what is killed is a process of its own."""
    from retention.config import compose
    from retention.training.run import run

    run(compose("train", [*SETTINGS, *more]))


def kill_after_first_checkpoint(folder: Path) -> None:
    process = subprocess.Popen(
        command(f"output_dir={folder}"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not list(folder.glob("checkpoints/*.ckpt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def gates(folder: Path) -> dict:
    return load_file(folder / "gates" / "gate_model.safetensors")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_killed_run_ends_with_bitwise_the_same_gates(tmp_path):
    finish(f"output_dir={tmp_path / 'whole'}")
    kill_after_first_checkpoint(tmp_path / "killed")
    assert not (tmp_path / "killed" / "gates").exists(), "the run was to be killed before its end"
    finish(f"resume={tmp_path / 'killed'}")
    whole, resumed = gates(tmp_path / "whole"), gates(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert tensor.equal(resumed[name]), name


def test_resuming_with_other_settings_names_the_setting(tmp_path):
    from retention.config import compose
    from retention.training.resume import claim

    claim(tmp_path / "run", compose("train", ["seed=1"]))
    with pytest.raises(ValueError, match="seed = 1, this one has 2"):
        claim(tmp_path / "run", compose("train", ["seed=2", f"resume={tmp_path / 'run'}"]))
    with pytest.raises(ValueError, match="holds a run already"):
        claim(tmp_path / "run", compose("train", ["seed=1"]))
    with pytest.raises(ValueError, match="expected a run to resume"):
        claim(tmp_path / "none", compose("train", [f"resume={tmp_path / 'none'}"]))
