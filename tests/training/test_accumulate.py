"""A step of several batches is the step of one large batch: counts known ahead, groups, exact continuation."""

from dataclasses import replace

import pytest
import torch

from retention.config import compose
from retention.data.loader import MixtureLoader
from retention.gates import RetentionGates
from retention.gates.trim import Trim
from retention.objectives.base import Step
from retention.objectives.distillation import Distillation
from retention.objectives.hard_eviction import HardEviction
from retention.objectives.kvzap import KVzap
from retention.training.module import collect
from retention.training.resume import claim
from retention.training.run import run
from tests.cache.helpers import model_of
from tests.training import test_own_data
from tests.training.test_lagrangian import SMALL, column
from tests.training.test_objectives import PEERS, batch, gates_for

chats = test_own_data.chats
EVERY = {
    **PEERS,
    "kvzap_answers": KVzap(queries="answers"),
    "distillation": Distillation(budget="20", queries=5),
    "exact": Distillation(budget="30%", queries=0),
    "hard_eviction": HardEviction(budget="30%"),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("packing", [False, True])
def test_what_is_counted_is_known_ahead(name, packing):
    """Of the padded batch, one of whose rows is not longer than the budget of 20."""
    objective, (inputs, labels) = EVERY[name], batch()
    torch.manual_seed(0)
    gates = gates_for(name) if name in PEERS else RetentionGates.for_model(Trim(gate_hidden=8), model_of())
    step = Step(labels, torch.Generator().manual_seed(0))
    terms, _ = objective.loss(collect(model_of(), gates, objective, inputs, step, packing=packing))
    ahead = Step(labels, torch.Generator().manual_seed(0))
    valid = inputs["attention_mask"].bool()
    objective.begin(ahead, valid)
    counts = objective.counts(ahead, valid, gates.shape)
    assert {key: float(count) for key, (_, count) in terms.terms.items()} == counts
    assert sum(counts.values()) > 0
    if name == "distillation":
        assert counts["capacity"] == 1


@pytest.mark.parametrize("objective", ["kvzap", "locret", "lagrangian_short_context", "duo_attention"])
def test_other_objectives_accumulate_as_well(objective, tmp_path):
    gate = ["gate=per_head"] if objective == "duo_attention" else []
    exact = ["objective.queries=0"] if "context" in objective else []
    told = [*SMALL, "trainer.max_steps=2", f"objective={objective}", *gate, *exact]
    whole, parts = (
        RetentionGates.from_pretrained(
            run(compose("train", [*told, f"output_dir={tmp_path / str(k)}", f"data.batch_size={4 // k}", f"trainer.accumulate={k}"]))
        )
        for k in (1, 2)
    )  # fmt: skip
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(tensor, parts.state_dict()[name], atol=2e-6, rtol=1e-5), name


def test_steps_not_batches_are_counted_and_logged(tmp_path):
    told = ["data.batch_size=1", "trainer.accumulate=3", "trainer.max_steps=4", "trainer.val_every=2"]
    run(compose("train", [*SMALL, *told, f"output_dir={tmp_path / 'run'}"]))
    assert len(column(tmp_path / "run", "val/hard_accuracy")) == 2
    assert max(column(tmp_path / "run", "step")) == 4
    assert column(tmp_path / "run", "cost/rows")[-1] == 4 * 3


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_cut_amid_a_step_goes_on_exactly(chats, tmp_path, monkeypatch):
    """The third of the second step's batches is never given."""
    told = [f"data.sources=[{{path: {chats}}}]", "trainer.accumulate=3", "trainer.max_steps=4", "trainer.save_every=1"]
    config, gates = test_own_data.config, test_own_data.gates
    run(config("qwen3_vl", tmp_path / "whole", *told))
    test_own_data.run_until(7, config("qwen3_vl", tmp_path / "cut", *told), monkeypatch)
    run(config("qwen3_vl", tmp_path / "cut", *told, f"resume={tmp_path / 'cut'}"))
    whole, cut = gates(tmp_path / "whole"), gates(tmp_path / "cut")
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


def test_a_continuation_may_cut_a_step_otherwise_but_not_change_its_rows(tmp_path):
    def told(*more, sources="[]"):
        return compose("train", [f"data.sources={sources}", *more])

    claim(tmp_path / "run", told("data.batch_size=4"))
    again = [f"resume={tmp_path / 'run'}", "data.batch_size=1"]
    claim(
        tmp_path / "run",
        told(*again, "trainer.accumulate=2", "trainer.devices=2", "trainer.strategy=ddp", "model.device=cpu"),
    )
    with pytest.raises(ValueError, match=r"'rows_per_step': 4.* this one has .*'rows_per_step': 2"):
        claim(tmp_path / "run", told(*again, "trainer.accumulate=2"))
    claim(tmp_path / "own", told("data.batch_size=4", sources="[{path: a}]"))
    with pytest.raises(ValueError, match="belongs to a run with data"):
        claim(tmp_path / "own", replace(told(*again, "trainer.accumulate=4", sources="[{path: a}]"), resume="own"))


def test_the_loader_gives_whole_steps(chats):
    own = test_own_data.data("llava", 5, sources=[test_own_data.SourceConfig(str(chats))], batch_size=2)
    own.accumulate = 2
    groups = own.train_dataloader()
    assert len(groups) == 5
    assert isinstance(groups.loader, MixtureLoader)
    steps = list(groups)
    assert [len(step) for step in steps] == [2] * 5
    assert groups.state_dict()["ranks"][0]["done"] == 10
