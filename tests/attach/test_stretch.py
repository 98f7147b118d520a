"""Stretched positions are those a model would be given by hand, and the model is afterwards what it was."""

from dataclasses import replace

import pytest
import torch

from retention.attach.forward import next_logits
from retention.attach.hard import evicting
from retention.attach.stretch import stretched
from retention.cache.config import CacheConfig
from retention.models.family import decoder_of
from retention.policies import POLICIES
from tests import tiny, zoo

FACTOR = 3


def prompt(name):
    """Inputs with images where the family has them, and the positions that its model gives them."""
    images = name not in zoo.TEXT
    inputs = zoo.batch(name, images=images)
    mask = inputs["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    if name in zoo.MROPE:
        told = {k: v for k, v in inputs.items() if k in ("image_grid_thw", "mm_token_type_ids")}
        places = zoo.loaded(name)[0].model.get_rope_index(inputs["input_ids"], attention_mask=mask, **told)[0]
    return inputs, places


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "llava", "qwen2_5_vl", "qwen3_vl"])
def test_stretched_positions_are_positions_times_the_factor(name):
    model, _ = zoo.loaded(name)
    inputs, places = prompt(name)
    with torch.no_grad():
        plain, wanted, shifted = (
            model(**inputs, position_ids=given).logits[:, -1] for given in (places, FACTOR * places, places + 50)
        )
        with stretched(model, FACTOR), evicting(model, POLICIES["full"]()) as cache:
            assert torch.allclose(next_logits(model, cache, inputs), wanted, atol=2e-4)
        assert torch.equal(model(**inputs, position_ids=places).logits[:, -1], plain)
    assert (wanted - plain).abs().max() > 0.02
    assert torch.allclose(shifted, plain, atol=2e-4)


def test_frequencies_come_back_bit_by_bit_even_after_an_error():
    model = tiny.tiny_llama()
    rotary = decoder_of(model).rotary_emb
    before = rotary.inv_freq.clone()

    def fail():
        assert torch.allclose(rotary.inv_freq, 0.3 * before)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), stretched(model, 0.3):
        fail()
    assert torch.equal(rotary.inv_freq, before)
    with stretched(model, 1.0):
        assert torch.equal(rotary.inv_freq, before)


def test_a_factor_that_would_not_hold_is_refused():
    changing = tiny.tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    for model, factor, sentence in (
        (changing, 2.0, r"frequencies that its forwards change \(dynamic\) in llama"),
        (tiny.tiny_llama(), 0.0, "a factor above 0, got 0"),
    ):
        with pytest.raises(ValueError, match=sentence), stretched(model, factor):
            pass


def test_an_evaluation_stretches_what_its_examples_say(embedded_model, embedded_processor):
    """The same contexts, further apart than the embedded model was trained on: the full cache alone falls behind."""
    from retention.data.render import Renderer
    from retention.evaluation.arms import Arm
    from retention.evaluation.protocol import Protocol
    from retention.evaluation.runner import Runner
    from retention.tasks.dilution import Dilution

    task = Dilution(n_blank=0, n_turns=6)
    runner = Runner(embedded_model, Renderer(embedded_processor, [2]), "symbolic")
    arm = Arm("full", POLICIES["full"](), CacheConfig(), "100%", Protocol(), False)
    found = {}
    for stretch in (1.0, 3.0):
        (batch,) = runner.batches(replace(task, stretch=stretch), "test", 0, 8, 8)
        ((_, _, rows),) = runner.run(batch, [arm], None)
        found[stretch] = sum(row["score"] for row in rows) / len(rows)
        places = batch.evidence[0][0]
        assert rows[0]["distance"] == stretch * (batch.lengths[0] - sum(places) / len(places))
        assert rows[0]["groups"] == {"cause": "none" if stretch == 1 else "position x3"}
    assert found[1.0] > 0.9
    assert found[3.0] < 0.7
    with pytest.raises(
        ValueError, match=r"expected examples at their own positions to train on, got dilution/.* 3 times"
    ):
        runner.renderer.training_batch([replace(task, stretch=3.0).example(0, "train", 0)])
