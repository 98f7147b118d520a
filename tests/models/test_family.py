"""What is read off the decoder of each supported architecture."""

from functools import partial

import pytest
import torch
from transformers import DynamicCache

from retention.models import FAMILIES, family_of
from retention.models.family import decoder_of, evictable_layers, fingerprint, model_shape, rope_of
from tests import hub, tiny, zoo

BUILDERS = {
    **zoo.TEXT,
    **{name: partial(hub.build, name) for name in hub.HUB},
    "llava": tiny.tiny_llava,
    "qwen2_5_vl": tiny.tiny_qwen2_5_vl,
    "qwen3_vl": tiny.tiny_qwen3_vl,
}
EVICTABLE = {"gemma2": (1, 3), "gemma3": (1, 2), "gemma3_text": (2,), "qwen3_next": (1, 3)}
WINDOWED = {
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen2_5_vl": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
}
GRIDS = ["qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize("name", BUILDERS)
def test_the_decoder_has_what_attachments_need(name):
    model = BUILDERS[name]()
    decoder, shape = decoder_of(model), model_shape(model)
    assert family_of(model) is FAMILIES[model.config.model_type]
    assert len(decoder.layers) == model.config.get_text_config().num_hidden_layers
    assert shape.layers == EVICTABLE.get(name, (0, 1, 2))
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.hidden_size) == (4, 2, 16, 64)
    assert all(hasattr(decoder.layers[i], "self_attn") for i in shape.layers)


@pytest.mark.parametrize("name", BUILDERS)
def test_shapes_are_those_of_the_keys_that_the_model_caches(name):
    model = BUILDERS[name]()
    shape, cache = model_shape(model), DynamicCache(config=model.config.get_text_config())
    model(input_ids=torch.arange(3, 12)[None], past_key_values=cache)
    for layer in shape.layers:
        assert cache.layers[layer].keys.shape == (1, shape.num_kv_heads, 9, shape.head_dim)


@pytest.mark.parametrize(("name", "changes"), [*((n, {}) for n in BUILDERS), *WINDOWED.items()])
def test_evictable_layers_are_those_without_a_window(name, changes):
    model = BUILDERS[name](**changes)
    stock = DynamicCache(config=model.config.get_text_config()).layers
    whole = tuple(i for i, layer in enumerate(stock) if type(layer).__name__ == "DynamicLayer")
    assert evictable_layers(model) == whole


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_are_seen(name):
    assert evictable_layers(BUILDERS[name](**WINDOWED[name])) != (0, 1, 2)


@pytest.mark.parametrize("name", BUILDERS)
def test_fingerprints_tell_bases_apart_in_any_dtype(name):
    model = BUILDERS[name]()
    found = fingerprint(model)
    assert fingerprint(BUILDERS[name]()) == found
    assert fingerprint(model.bfloat16())["weight_hash"] == found["weight_hash"]
    other = fingerprint(BUILDERS[name](seed=1))
    assert (other["config_hash"], other["weight_hash"] == found["weight_hash"]) == (found["config_hash"], False)


@pytest.mark.parametrize("name", GRIDS)
def test_visual_tokens_are_those_of_images_and_videos(name):
    model, inputs = BUILDERS[name](), tiny.grid_inputs(3, (2, 3), 2)
    ids = torch.cat([inputs["input_ids"], torch.tensor([[tiny.VIDEO_TOKEN]])], 1)
    expected = [False] * 3 + [True] * 6 + [False] * 2 + [True]
    assert family_of(model).visual_mask(model.config, ids).tolist() == [expected]


@pytest.mark.parametrize("name", GRIDS)
def test_images_change_what_the_model_reads(name):
    model, inputs = BUILDERS[name](), tiny.grid_inputs(3, (2, 3), 2)
    seen = model(**inputs).logits[:, -1]
    other = model(**inputs | {"pixel_values": -inputs["pixel_values"]}).logits[:, -1]
    assert not torch.allclose(seen, other, atol=0.01)


@pytest.mark.parametrize("name", [n for n in BUILDERS if n not in zoo.MROPE])
def test_one_dimensional_frequencies(name):
    model = BUILDERS[name]()
    found = rope_of(model, family_of(model))
    assert (found.axes, found.axis.tolist()) == (1, [0] * len(found.frequencies()))


@pytest.mark.parametrize(("name", "axis"), [(GRIDS[0], [0, 0, 0, 0, 1, 1, 2, 2]), (GRIDS[1], [0, 1, 2, 0, 1, 2, 0, 0])])
def test_axes_of_several_dimensions(name, axis):
    model = BUILDERS[name]()
    found = rope_of(model, family_of(model))
    assert (found.axes, found.axis.tolist()) == (3, axis)
