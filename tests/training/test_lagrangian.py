"""A multiplier in place of a hand-set weight: it follows the missed budget, meets it, and survives a kill."""

import csv

import pytest
import torch
from safetensors.torch import load_file

from retention.config import compose
from retention.gates import RetentionGates
from retention.gates.trim import Trim
from retention.losses import relative_excess
from retention.objectives.base import Step
from retention.objectives.distillation import Distillation
from retention.ops.capacity import expected_size
from retention.training.export import export_checkpoint
from retention.training.module import GateTrainer, collect
from retention.training.run import run
from tests.cache.helpers import gates_of, model_of, tokens

SMALL = [
    "trainer=smoke", "trainer.max_steps=4", "trainer.val_every=2", "trainer.save_every=2", "data.batch_size=2",
    "data.val_examples=2", "logger=csv", "task.n_images=4", "task.n_needles=12", "task.n_asked=6", "task.n_turns=4",
    "data.n_turns=4",
]  # fmt: skip
LAGRANGIAN = Distillation(budget="4", constraint="lagrangian", lagrangian_rate=0.5)


def losses(objective, multiplier=None):
    ids = tokens(2, 24)
    step = Step(ids.masked_fill(torch.arange(24) < 16, -100), torch.Generator().manual_seed(0), multiplier=multiplier)
    return objective.loss(collect(model_of(), gates_of(), objective, {"input_ids": ids}, step))


def test_the_excess_is_signed_in_budgets_and_means_over_eligible_queries():
    sizes = torch.tensor([[[[1.0, 4.0, 8.0], [1.0, 4.0, 4.0]]], [[[1.0, 2.0, 2.0], [1.0, 2.0, 2.0]]]])
    queries, budget = torch.tensor([[1, 4, 9]]), torch.tensor([4.0])
    assert sizes.shape[:3] == (2, 1, 2)
    assert relative_excess(sizes, queries, budget).item() == pytest.approx(((3 - 4) / 4 + (4 - 4) / 4) / 2)
    assert relative_excess(sizes, queries, torch.tensor([99.0])).item() == 0


def test_the_multiplier_climbs_with_the_excess_and_never_below_zero():
    assert LAGRANGIAN.first_multiplier() == 1.0
    assert LAGRANGIAN.next_multiplier(1.0, 0.5) == 1.25
    assert LAGRANGIAN.next_multiplier(1.0, 70.0) == LAGRANGIAN.next_multiplier(1.0, 1.0) == 1.5
    assert LAGRANGIAN.next_multiplier(1.0, -1.0) == 0.5
    assert LAGRANGIAN.next_multiplier(0.2, -1.0) == 0.0
    assert Distillation(budget="4").first_multiplier() is None


def test_it_weighs_the_capacity_and_nothing_else():
    hinge, _ = losses(Distillation(budget="4"))
    for weight in (0.0, 0.3, 5.0):
        terms, figures = losses(LAGRANGIAN, weight)
        assert terms.weights == {**hinge.weights, "capacity": weight}
        assert all(torch.equal(terms.means()[name], hinge.means()[name]) for name in hinge.terms)
    assert losses(LAGRANGIAN)[0].weights == hinge.weights
    assert figures["excess"].item() > 0
    assert "excess" not in losses(Distillation(budget="4"))[1]


def test_it_meets_the_budget_that_too_small_a_weight_misses():
    """A weight of next to nothing leaves the cache full; the multiplier grows until the budget holds."""
    ids, missed = tokens(2, 32), {}
    for constraint in ("hinge", "lagrangian"):
        torch.manual_seed(0)
        gates = RetentionGates.for_model(Trim(gate_hidden=8, init_half_life=100.0), model_of())
        optimiser = torch.optim.Adam(gates.parameters(), lr=0.03)
        given = {"budget": "6", "capacity_weight": 1e-3, "capacity_norm": "budget", "lagrangian_rate": 0.02}
        chosen = Distillation(constraint=constraint, **given)
        multiplier, tail = chosen.first_multiplier(), []
        for number in range(150):
            labels = ids.masked_fill(torch.arange(32) < 24, -100)
            step = Step(labels, torch.Generator().manual_seed(number), multiplier=multiplier)
            terms, _ = chosen.loss(seen := collect(model_of(), gates, chosen, {"input_ids": ids}, step))
            optimiser.zero_grad()
            terms.loss().backward()
            optimiser.step()
            excess = excess_of(seen)
            multiplier = None if multiplier is None else chosen.next_multiplier(multiplier, excess)
            tail.append(excess)
        missed[constraint] = sum(tail[-30:]) / 30
    assert missed["hinge"] > 0.5
    assert abs(missed["lagrangian"]) < 0.15


def excess_of(seen):
    queries = torch.arange(6, 32).expand(2, -1)
    sizes = torch.stack([expected_size(x.detach(), seen.positions, queries, seen.valid) for x in seen.log_beta])
    return relative_excess(sizes, queries, seen.step.budget).item()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_logs_it_and_goes_on_bitwise(tmp_path, monkeypatch):
    """Killed after its first checkpoint: the same gates and the same multipliers as without."""
    settings = [*SMALL, "objective=lagrangian_short_context", "objective.lagrangian_rate=0.5"]
    whole = run(compose("train", [*settings, f"output_dir={tmp_path / 'whole'}"]))
    state = interrupted(monkeypatch, [*settings, f"output_dir={tmp_path / 'cut'}"], tmp_path / "cut")
    assert state["multiplier"] == 2.0 + 2 * 0.5
    again = run(compose("train", [*settings, f"resume={tmp_path / 'cut'}"]))
    a, b = (load_file(folder / "gate_model.safetensors") for folder in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    last = [final_state(folder.parent) for folder in (whole, again)]
    assert last[0]["multiplier"] == last[1]["multiplier"]
    logged = column(tmp_path / "whole", "loss/multiplier")
    assert logged
    assert all(x > 0 for x in logged)


def column(folder, name):
    """What a run logged under a name."""
    (file,) = folder.rglob("metrics.csv")
    return [float(row[name]) for row in csv.DictReader(file.read_text().splitlines()) if row.get(name)]


def interrupted(monkeypatch, settings, folder):
    """Stop a run in its third step and give the checkpoint that it left."""
    step = GateTrainer.training_step

    def dying(self, batch, batch_idx):
        if self.global_step == 3:
            raise InterruptedError
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(GateTrainer, "training_step", dying)
        with pytest.raises(InterruptedError):
            run(compose("train", settings))
    assert not (folder / "gates").exists()
    return final_state(folder)


def final_state(folder):
    file = max((folder / "checkpoints").glob("*.ckpt"), key=lambda x: int(x.stem.split("=")[1]))
    return torch.load(file, weights_only=True)  # noqa: TID251  (Lightning's resume file)


def test_exports_of_a_checkpoint_are_gates_alone(tmp_path):
    settings = [*SMALL, "objective=lagrangian_short_context", f"output_dir={tmp_path / 'run'}"]
    run(compose("train", settings))
    file = next((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    for which in ("best", "last"):
        artefact = export_checkpoint(file, tmp_path / which, which=which)
        assert RetentionGates.from_pretrained(artefact).training_record["constraint"] == "lagrangian"


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"objective\.constraint hinge or lagrangian, got 'soft'"):
        Distillation(constraint="soft")
    with pytest.raises(ValueError, match=r"objective\.lagrangian_rate above 0, got 0"):
        Distillation(lagrangian_rate=0)
