"""Sweeps and clusters by Hydra's own launchers."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from retention.config import command_line, compose
from retention.training.resume import settings
from tests.training.test_resume import ROOT, SETTINGS, environment


def hydra(*arguments):
    done = subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("launcher", ["basic", "submitit_local"])
def test_a_sweep_over_seeds(tmp_path, launcher):
    short = ["trainer.max_steps=1", "trainer.val_every=1", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    hydra("-m", f"hydra/launcher={launcher}", *SETTINGS, *short, "seed=3,4", f"output_dir={tmp_path}/seed${{seed}}")
    for seed in (3, 4):
        assert (tmp_path / f"seed{seed}" / "gates" / "gate_model.safetensors").exists()
        assert f'"seed": {seed}' in (tmp_path / f"seed{seed}" / "config.json").read_text()


def shown(monkeypatch, *arguments):
    """What the command does before it would train, in this process."""
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]  # else train.log stays open
    monkeypatch.setattr(sys, "argv", ["train.py", "--cfg", "hydra", *arguments, *quiet])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # which is set anyway, and taken back behind the test
    command_line("train", pytest.fail)


def test_the_ready_config_for_slurm_composes(monkeypatch, capsys):
    shown(monkeypatch, "-p", "hydra.launcher", "hydra/launcher=slurm")
    text = capsys.readouterr().out
    assert "SlurmLauncher" in text
    assert "gpus_per_node: 1" in text
    assert "signal_delay_s: 120" in text


def test_ray_is_named_where_it_is_not_installed(monkeypatch):
    """The preset only names the launcher; Hydra says what is missing."""
    assert find_spec("hydra_plugins.hydra_ray_launcher") is None
    with pytest.raises(SystemExit, match=r"^error: .*got 'ray'"):
        shown(monkeypatch, "hydra/launcher=ray_cluster")


def test_devices_are_part_of_what_a_run_is():
    assert settings(compose("train", []))["trainer"]["devices"] == 1
