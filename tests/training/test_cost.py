"""What a run has used: passes of the frozen base by objective, rows and bad rows, through a kill and in the artefact."""

import json

import pytest
import torch

from retention.attach.hidden import entrance, final_hidden
from retention.attach.recompute import recomputing
from retention.attach.soft import attach_gates
from retention.config import compose
from retention.gates import RetentionGates
from retention.gates.trim import Trim
from retention.training.cost import Passes
from retention.training.run import run
from tests.cache.helpers import model_of, tokens
from tests.training import test_own_data
from tests.training.test_lagrangian import SMALL, column, interrupted

chats = test_own_data.chats
PASSES = {
    "short_context": ([], 3),
    "recomputed": (["objective=short_context", "trainer.recompute_activations=true"], 4),
    "kvzap": (["objective=kvzap"], 1),
    "hard_eviction_short_context": (["objective=hard_eviction_short_context"], 3),
    "adapter": (["objective=hard_eviction_short_context", "trainer.lora_rank=2"], 4),
}
"""Forwards for each token: teacher, student and its backward; recomputation; a single forward; foresight with the
teacher's; foresight apart, since the adapter is off for the teacher."""


@pytest.mark.parametrize("name", PASSES)
def test_a_run_tells_what_it_cost(name, tmp_path):
    overrides, passes = PASSES[name]
    artefact = run(compose("train", [*SMALL, "data.batch_size=1", *overrides, f"output_dir={tmp_path / 'run'}"]))
    cost = json.loads((artefact / "gate_config.json").read_text())["training"]["cost"]
    assert cost["rows"] == 4
    assert cost["forwards"] == passes * cost["tokens"], "a row alone has no padding"
    for key, value in cost.items():
        assert column(tmp_path / "run", f"cost/{key}")[-1] == value


@pytest.mark.parametrize("recompute", [False, True])
def test_passes_are_what_was_computed(recompute):
    model, ids = model_of(), tokens(2, 20)
    gates = RetentionGates.for_model(Trim(gate_hidden=8), model)
    passes = Passes(model, gates.shape.layers[-1])
    start = entrance(model, {"input_ids": ids})
    assert passes.tokens == 0
    with torch.no_grad():
        final_hidden(model, start)
    assert passes.tokens == 40
    with attach_gates(model, gates), recomputing(model, active=recompute):
        hidden = final_hidden(model, start)
    assert passes.tokens == 40 + 80
    hidden.sum().backward()
    assert passes.stop() == 40 + 80 + 40 * recompute
    final_hidden(model, start)
    assert passes.tokens == 40 + 80 + 40 * recompute


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_killed_run_counts_on(tmp_path, monkeypatch):
    whole = run(compose("train", [*SMALL, f"output_dir={tmp_path / 'whole'}"]))
    interrupted(monkeypatch, [*SMALL, f"output_dir={tmp_path / 'cut'}"], tmp_path / "cut")
    again = run(compose("train", [*SMALL, f"resume={tmp_path / 'cut'}"]))
    costs = [json.loads((x / "gate_config.json").read_text())["training"]["cost"] for x in (whole, again)]
    assert costs[0] == costs[1]
    assert costs[0]["rows"] == 8


def test_bad_rows_are_logged_by_reason_and_told_in_the_end(chats, tmp_path):
    told = [f"data.sources=[{{path: {chats}}}]", "trainer.max_steps=8", "data.batch_size=4", "data.max_tokens=4000"]
    artefact = run(test_own_data.config("qwen3_vl", tmp_path / "run", *told))
    record = json.loads((artefact / "gate_config.json").read_text())["training"]
    assert set(record["data"]["bad_rows"]) == {"missing image", "empty text"}
    for reason, count in record["data"]["bad_rows"].items():
        assert column(tmp_path / "run", f"data/bad_rows/{reason}")[-1] == count > 0
    assert column(tmp_path / "run", "cost/rows")[-1] == record["cost"]["rows"] > 20
