"""Rows laid end to end in the decoder: the same loss and gradients, documents that never see each other."""

import pytest
import torch

from retention import RetentionGates
from retention.attach.facts import shape_of
from retention.attach.hidden import entrance, final_hidden, packed
from retention.gates.dbtrim import DBTrim
from retention.objectives.base import Step
from retention.objectives.distillation import Distillation
from retention.objectives.dms import DMS
from retention.objectives.hard_eviction import HardEviction
from retention.objectives.kvzap import KVzap
from retention.ops.documents import Documents
from retention.training.module import collect
from tests import zoo
from tests.cache.helpers import gap

FULL = [name for name in zoo.EVERY if name not in ("gemma2", "gemma3", "gemma3_text", "qwen3_next")]
OBJECTIVES = {
    "distillation": Distillation(budget="4", queries=5),
    "hard_eviction": HardEviction(budget="4", queries=5),
    "dms": DMS(window=3, ratio=4.0),
    "kvzap": KVzap(),
}


def labels_of(inputs):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-4] = -100
    return labels


def graded(name, objective, inputs, *, seed=3, packing=False, recompute=False):
    """Loss and the gates' gradients of one step."""
    model = zoo.loaded(name)[0]
    torch.manual_seed(seed)
    gates = RetentionGates.for_model(DBTrim(gate_hidden=8, init_half_life=10.0), model)
    for key, parameter in gates.named_parameters():
        if "offset" not in key:
            torch.nn.init.normal_(parameter, std=0.5)
    step = Step(labels_of(inputs), torch.Generator().manual_seed(0), 0.5)
    how = {"packing": packing, "recompute": recompute}
    loss = objective.loss(collect(model, gates, objective, dict(inputs), step, **how))[0].loss()
    return loss.detach(), torch.autograd.grad(loss, list(gates.parameters()))


def same(one, other):
    assert abs(one[0] - other[0]) < 1e-5
    assert all(gap(a, b) < 1e-5 * max(1.0, float(b.abs().max())) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("name", FULL)
def test_a_packed_step_is_the_padded_step(name):
    inputs = zoo.batch(name, images=name not in zoo.TEXT)
    assert not inputs["attention_mask"].bool().all()
    padded = graded(name, OBJECTIVES["distillation"], inputs)
    same(graded(name, OBJECTIVES["distillation"], inputs, packing=True), padded)


@pytest.mark.parametrize("objective", ["hard_eviction", "dms", "kvzap"])
def test_so_it_is_for_other_objectives(objective):
    inputs = zoo.batch("qwen3")
    padded = graded("qwen3", OBJECTIVES[objective], inputs)
    same(graded("qwen3", OBJECTIVES[objective], inputs, packing=True), padded)


@pytest.mark.parametrize("name", ["llama", "qwen3_vl"])
def test_and_where_layers_are_run_again(name):
    inputs = zoo.batch(name, images=name not in zoo.TEXT)
    kept = graded(name, OBJECTIVES["distillation"], inputs, packing=True)
    same(graded(name, OBJECTIVES["distillation"], inputs, packing=True, recompute=True), kept)


@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl", "smolvlm"])
def test_a_document_is_what_it_is_alone(name):
    """The decoder gets one row without padding, and nothing of a neighbour reaches a document."""
    model, inputs = zoo.loaded(name)[0], zoo.batch(name, images=name not in zoo.TEXT)
    real = inputs["attention_mask"].bool()
    start = packed(model, entrance(model, dict(inputs)))
    assert start.documents.lengths == tuple(real.sum(1).tolist())
    assert shape_of(start.arguments)[:2] == (1, int(real.sum()))
    with torch.no_grad():
        hidden = final_hidden(model, start)
        assert gap(hidden[real], final_hidden(model, entrance(model, dict(inputs)))[real]) < 1e-5
        other = dict(inputs)
        other["input_ids"] = other["input_ids"].clone()
        other["input_ids"][0, -2:] += 1
        moved = final_hidden(model, packed(model, entrance(model, other)))
    assert torch.equal(moved[1], hidden[1])
    assert gap(moved[0], hidden[0]) > 1e-4


def test_rows_and_documents_are_two_views_of_the_same():
    valid = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    documents, told = Documents.of(valid), torch.arange(24.0).view(3, 4, 2)
    row = documents.packed(told)
    assert row.shape == (1, 9, 2)
    assert torch.equal(row[0], told[valid])
    assert torch.equal(documents.padded(row), told * valid[..., None])
    assert torch.equal(documents.packed(told.movedim(2, 0), 1)[:, 0], row[0].T)
    assert documents.positions().tolist() == [[0, 1, 0, 1, 2, 3, 0, 1, 2]]


def test_rows_of_one_length_stay_as_they_are():
    model, inputs = zoo.loaded("llama")[0], zoo.batch("llama")
    inputs = {key: value[:1] for key, value in inputs.items()}
    start = entrance(model, inputs)
    assert packed(model, start) is start


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "qwen3_next"])
def test_layers_that_are_not_held_to_documents_are_refused(name):
    model = zoo.loaded(name)[0]
    with pytest.raises(
        ValueError, match=r"expected a decoder of full causal attention for data.packing, got .* set data"
    ):
        packed(model, entrance(model, zoo.batch(name)))
