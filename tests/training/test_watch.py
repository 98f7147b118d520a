"""What a run shows of itself, and what stops it without losing anything."""

import csv
import math
import signal
import subprocess
import time

import pytest
import torch

from retention.config import compose
from retention.objectives.distillation import Distillation
from retention.training.resume import newest_checkpoint
from retention.training.run import run
from retention.training.watch import retained
from tests.training.test_resume import ROOT, SETTINGS, command, environment, finish, gates


def composed(folder, *more):
    return compose("train", [*SETTINGS, f"output_dir={folder}", *more])


def rows(folder):
    with next(folder.glob("csv/**/metrics.csv")).open() as file:
        return list(csv.DictReader(file))


def test_retained_shares_by_hand():
    """Two tokens of text and one of vision behind a padded column; beta of a half."""
    valid, visual = torch.tensor([[False, True, True, True]]), torch.tensor([[False, False, True, False]])
    found = retained([torch.full((1, 2, 4), math.log(0.5))], valid, visual)
    assert found == {
        "retained/layer0_text": pytest.approx((0.5**3 + 0.5) / 2),
        "retained/layer0_vision": pytest.approx(0.25),
    }


def test_a_run_shows_speed_memory_gradients_and_retained_shares(tmp_path):
    run(composed(tmp_path / "run", "trainer.max_steps=4"))
    last = [row for row in rows(tmp_path / "run") if row.get("speed/tokens_per_second")][-1]
    assert float(last["speed/tokens_per_second"]) > 0
    assert float(last["memory/peak_bytes"]) > 2**20
    assert float(last["gradient_norm"]) > 0
    for layer in range(2):
        for kind in ("text", "vision"):
            assert 0 < float(last[f"retained/layer{layer}_{kind}"]) <= 1


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_and_keeps_what_was_good(tmp_path, monkeypatch, what):
    loss, calls = Distillation.loss, []

    def poisoned(self, collected):
        calls.append(1)
        terms, figures = loss(self, collected)
        if len(calls) == 4:
            total, count = terms.terms["kl"]
            terms.terms["kl"] = (total * math.nan if what == "loss" else total + (0 * total).sqrt()), count
        return terms, figures

    monkeypatch.setattr(Distillation, "loss", poisoned)
    named = {"loss": "the loss is nan", "gradient": "is not finite"}[what]
    with pytest.raises(
        ValueError, match=rf"{named}.* at step 3, in the batch of .*train.*; the gates of step 2 are in .*step=2"
    ):
        run(composed(tmp_path / "run"))
    file, step = newest_checkpoint(tmp_path / "run")
    assert step == 2
    state = torch.load(file, weights_only=True)["state_dict"]  # noqa: TID251  (Lightning's resume file)
    assert all(torch.isfinite(x).all() for x in state.values())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    """As a queue does it: the same settings with resume=auto, terminated and started again, end as if never stopped."""
    longer = ["trainer.max_steps=30", "trainer.val_every=30", "trainer.save_every=1000"]
    finish(f"output_dir={tmp_path / 'whole'}", *longer)
    own = [f"output_dir={tmp_path / 'stopped'}", "resume=auto", *longer]
    process = subprocess.Popen(
        command(*own), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    folder, deadline = tmp_path / "stopped", time.monotonic() + 240
    while not (folder / "csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output[-2000:]
    assert not (folder / "gates").exists(), "the run was to be stopped before its end"
    assert newest_checkpoint(folder)[1] > 0, output[-2000:]
    finish(*own)
    whole, resumed = gates(tmp_path / "whole"), gates(folder)
    for name, tensor in whole.items():
        assert tensor.equal(resumed[name]), name
