"""Sweeps and clusters by Hydra's own launchers."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from retention.config import compose
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


def test_the_ready_config_for_slurm_composes():
    text = hydra("--cfg", "hydra", "-p", "hydra.launcher", "hydra/launcher=slurm")
    assert "SlurmLauncher" in text
    assert "gpus_per_node: 1" in text
    assert "signal_delay_s: 120" in text


def test_ray_is_named_where_it_is_not_installed():
    """The preset only names the launcher; Hydra says what is missing."""
    assert find_spec("hydra_plugins.hydra_ray_launcher") is None
    done = subprocess.run(
        [sys.executable, "train.py", "--cfg", "hydra", "hydra/launcher=ray_cluster"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode != 0
    assert "ray" in done.stderr


def test_devices_are_part_of_what_a_run_is():
    assert settings(compose("train", []))["trainer"]["devices"] == 1
