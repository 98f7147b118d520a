"""What must hold for every family: open gates and ample budgets change nothing, eviction equals hiding, gates learn."""

from functools import lru_cache

import pytest
import torch

from retention import Budget, CacheConfig, RetentionGates, evicting
from retention.attach.hidden import entrance, final_hidden
from retention.attach.soft import attach_gates
from retention.gates.dbtrim import DBTrim
from retention.models import FAMILIES, family_of
from retention.models.family import decoder_of, head_of
from retention.objectives.base import Step
from retention.objectives.distillation import Distillation
from retention.policies import POLICIES
from retention.training.module import collect
from tests import zoo
from tests.attach.helpers import snapshot
from tests.cache.helpers import gap, small
from tests.cache.truth import Hiding

CASES = [(name, images) for name in zoo.EVERY for images in ((False,) if name in zoo.TEXT else (True, False))]
VISION = [name for name in zoo.EVERY if name not in zoo.TEXT]
NEW = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@lru_cache
def gates_of(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        gates = RetentionGates.for_model(DBTrim(gate_hidden=8, init_half_life=10.0), zoo.loaded(name)[0])
        for key, parameter in gates.named_parameters():
            if "offset" not in key:
                torch.nn.init.normal_(parameter, std=0.5)
    return gates


def test_every_family_is_tested():
    assert {zoo.loaded(name)[0].config.model_type for name in zoo.EVERY} == set(FAMILIES)


@pytest.mark.parametrize(("name", "images"), CASES)
def test_gates_that_never_forget_are_the_base(name, images):
    """Half-life to infinity; on leaving, the model is as before."""
    (model, _), inputs = zoo.loaded(name), zoo.batch(name, images=images)
    inputs, real = zoo.positioned(name, inputs), inputs["attention_mask"].bool()
    gates = RetentionGates.for_model(DBTrim(gate_hidden=8), model)
    for key, parameter in gates.named_parameters():
        torch.nn.init.constant_(parameter, 1e4 if "offset" in key else 0.0)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        before = snapshot(model)  # a tower's first forward leaves hooks of transformers on it
        with attach_gates(model, gates) as record:
            got = model(**inputs, use_cache=False).logits
    assert all(not x.any() for x in record.log_beta.values())
    assert torch.equal(got[real], expected[real])
    assert snapshot(model) == before


@pytest.mark.parametrize(("name", "images"), CASES)
def test_a_budget_beyond_the_context_generates_what_the_full_cache_does(name, images):
    (model, _), inputs = zoo.loaded(name), zoo.batch(name, images=images)
    expected = model.generate(**inputs, **NEW)
    before = snapshot(model)
    with evicting(model, POLICIES["db_trim_kv"](), CacheConfig(Budget(512.0)), gates=gates_of(name)) as cache:
        out = model.generate(**inputs, past_key_values=cache, **NEW)
    assert torch.equal(out.sequences, expected.sequences)
    assert max(gap(a, b) for a, b in zip(out.logits, expected.logits, strict=True)) < 1e-5
    assert snapshot(model) == before


@pytest.mark.parametrize("policy", ["db_trim_kv", "snapkv"])
@pytest.mark.parametrize(("name", "images"), CASES)
def test_a_quarter_of_a_padded_batch_equals_the_hidden_full_cache(name, images, policy):
    """Prompt, decoded tokens and a second turn."""
    (model, _), inputs = zoo.loaded(name), zoo.batch(name, images=images)
    oracle, config = Hiding(model), CacheConfig(Budget(0.25, "fraction"))
    mask, extra = inputs["attention_mask"], torch.randint(70, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with evicting(model, small(policy), config, gates=gates_of(name)) as cache, torch.no_grad():
        part, real = zoo.positioned(name, inputs), mask
        for cut in (slice(0, 1), slice(1, 2), slice(2, 7), slice(7, 8), slice(8, 9), None):
            got = model(**part, past_key_values=cache, use_cache=True).logits
            assert gap(got, oracle.feed(**part), real) < 1e-4
            oracle.drop(cache)
            if cut is None:
                break
            ids = extra[:, cut]
            part = {"input_ids": ids, **zoo.following(name, mask, ids.shape[1], cache.rope_deltas)}
            mask, real = part["attention_mask"], torch.ones_like(ids)
    assert cache.evicted


@pytest.mark.parametrize(("name", "images"), CASES)
def test_generate_evicts_as_a_loop_does(name, images):
    (model, _), inputs = zoo.loaded(name), zoo.batch(name, images=images)
    config = CacheConfig(Budget(0.25, "fraction"))
    with evicting(model, POLICIES["db_trim_kv"](), config, gates=gates_of(name)) as cache, torch.no_grad():
        twin, mask = cache.fork(), inputs["attention_mask"]
        out = model.generate(**inputs, past_key_values=cache, **NEW)
        logits = model(**zoo.positioned(name, inputs), past_key_values=twin).logits[:, -1]
        for step in out.logits:
            assert gap(logits, step) < 1e-4
            part = {"input_ids": logits.argmax(-1, keepdim=True), **zoo.following(name, mask, 1, twin.rope_deltas)}
            mask, logits = part["attention_mask"], model(**part, past_key_values=twin).logits[:, -1]


@pytest.mark.parametrize("name", zoo.EVERY)
def test_two_steps_teach_every_gate_and_nothing_else(name):
    (model, _), inputs = zoo.loaded(name), zoo.batch(name, images=name not in zoo.TEXT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        gates = RetentionGates.for_model(DBTrim(gate_hidden=8, init_half_life=20.0), model)
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    labels[:, : labels.shape[1] // 2] = -100
    objective, optimiser = Distillation(budget="4"), torch.optim.AdamW(gates.parameters(), lr=0.02)
    losses = []
    for _ in range(3):
        step = Step(labels, torch.Generator().manual_seed(0))
        terms, _ = objective.loss(collect(model, gates, objective, inputs, step))
        optimiser.zero_grad()
        terms.loss().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gates.parameters())
        assert all(p.grad is None for p in model.parameters())
        losses.append(terms.loss().item())
        optimiser.step()
    assert losses[2] < losses[0]


@pytest.mark.parametrize("name", VISION)
def test_visual_tokens_are_marked(name):
    """Also of several images of different sizes in a row; the cache marks the same entries."""
    (model, _), inputs = zoo.loaded(name), zoo.batch(name, images=True)
    expected = inputs["input_ids"] == model.config.image_token_id
    assert expected.any(1).all()
    with evicting(model, small("knorm"), CacheConfig(Budget(512.0))) as cache, torch.no_grad():
        model(**zoo.positioned(name, inputs), past_key_values=cache)
        assert torch.equal(cache.evicting_layers[0].state().visual[:, 0], expected)
    assert torch.equal(family_of(model).visual_mask(model.config, inputs["input_ids"]), expected)
    text = zoo.batch(name)
    assert not family_of(model).visual_mask(model.config, text["input_ids"]).any()


@pytest.mark.parametrize("name", VISION)
def test_images_change_the_answer(name):
    (model, _), inputs = zoo.loaded(name), zoo.positioned(name, zoo.batch(name, images=True))
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}
    assert gap(model(**inputs).logits[:, -1], model(**other).logits[:, -1]) > 1e-4


@pytest.mark.parametrize("name", zoo.EVERY)
def test_the_way_into_the_decoder_and_the_head_are_the_models(name):
    """The vision tower runs once; final hidden states through the head are the model's logits."""
    (model, _), inputs = zoo.loaded(name), zoo.positioned(name, zoo.batch(name, images=name not in zoo.TEXT))
    model(**inputs)
    before, calls = snapshot(model), []
    start = entrance(model, inputs)
    assert snapshot(model) == before
    tower = next((m for n, m in model.named_modules() if n.endswith(("vision_tower", "visual", "vision_model"))), None)
    hook = None if tower is None else tower.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        got = head_of(model)(final_hidden(model, start))
        assert not calls
        expected = model(**inputs, use_cache=False).logits
    assert (tower is None) == (not calls)
    if hook is not None:
        hook.remove()
    assert gap(got, expected) < 1e-5
    assert decoder_of(model) is not model
