"""Running layers again in the backward: the same gradients, less held, nothing left on the model."""

import pytest
import torch

from retention import RetentionGates
from retention.attach.recompute import recomputing
from retention.gates.dbtrim import DBTrim
from retention.objectives.base import Step
from retention.objectives.distillation import Distillation
from retention.objectives.dms import DMS
from retention.training.module import collect
from tests import zoo
from tests.attach.helpers import snapshot


def gradients(name, objective, *, recompute):
    """Loss, gradients of gates, and bytes saved for the backward of the student."""
    (model, _), inputs = zoo.loaded(name), zoo.batch(name, images=name not in zoo.TEXT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        gates = RetentionGates.for_model(DBTrim(gate_hidden=8, init_half_life=20.0), model)
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    step, held = Step(labels, torch.Generator().manual_seed(0), 0.5), []

    def pack(x):
        held.append(x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        collected = collect(model, gates, objective, inputs, step, recompute=recompute)
    terms, _ = objective.loss(collected)
    terms.loss().backward()
    return terms.loss().item(), [p.grad for p in gates.parameters()], sum(held)


@pytest.mark.parametrize("objective", [Distillation(budget="4"), DMS(window=4)], ids=["distillation", "dms"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_vl", "gemma3"])
def test_gradients_are_the_same_and_less_is_held(name, objective):
    loss, plain, much = gradients(name, objective, recompute=False)
    again, same, little = gradients(name, objective, recompute=True)
    assert again == pytest.approx(loss, abs=1e-6)
    for a, b in zip(plain, same, strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-4)
    assert little < much / 3


def test_nothing_is_left_on_the_model():
    model, _ = zoo.loaded("llama")
    before, layer = snapshot(model), model.get_decoder().layers[0]
    with recomputing(model):
        assert "forward" in vars(layer)
    assert "forward" not in vars(layer)
    assert snapshot(model) == before
    with recomputing(model, active=False):
        assert "forward" not in vars(layer)


def test_a_forward_of_somebody_elses_stays():
    model, _ = zoo.loaded("llama")
    layer = model.get_decoder().layers[0]
    own = layer.forward
    layer.forward = own
    try:
        with recomputing(model):
            assert layer.forward is not own
        assert layer.forward is own
    finally:
        del layer.forward
