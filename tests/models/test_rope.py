"""Turned keys against each architecture's own rotary embedding, for every variant of frequencies and axes."""

import copy

import pytest
import torch

from retention.models import Family, family_of, rope_of
from retention.models.family import decoder_of
from retention.ops.rope import angles, turn_keys
from tests import tiny
from tests.cache.truth import turned

BASE = {"rope_theta": 10_000.0}
LENGTH = 64
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": LENGTH}
LONG = {"rope_type": "longrope", "short_factor": [1.0 + i / 9 for i in range(8)], "long_factor": [4.0 + i for i in range(8)]}  # fmt: skip
LONG |= {"original_max_position_embeddings": LENGTH, "factor": 8.0}
PHI = {"original_max_position_embeddings": LENGTH, "max_position_embeddings": 8 * LENGTH}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
SECTIONS = {"mrope_section": [2, 3, 3]}


def scaled(rope_type, **parameters):
    return {"rope_parameters": BASE | {"rope_type": rope_type} | parameters}


CASES = {
    "llama": (tiny.tiny_llama, {}),
    "linear": (tiny.tiny_llama, scaled("linear", factor=3.0)),
    "llama3": (tiny.tiny_llama, scaled("llama3", **LLAMA3)),
    "yarn": (tiny.tiny_llama, scaled("yarn", factor=4.0, original_max_position_embeddings=LENGTH)),
    "dynamic": (tiny.tiny_llama, {"rope_parameters": BASE | DYNAMIC, "max_position_embeddings": LENGTH}),
    "longrope": (tiny.tiny_llama, {"rope_parameters": BASE | LONG}),
    "qwen2": (tiny.tiny_qwen2, {}),
    "qwen3": (tiny.tiny_qwen3, {}),
    "mistral": (tiny.tiny_mistral, {}),
    "llava": (tiny.tiny_llava, {}),
    "phi3": (tiny.tiny_phi3, {}),
    "phi3-partial": (tiny.tiny_phi3, scaled("default", partial_rotary_factor=0.5)),
    "phi3-longrope": (tiny.tiny_phi3, PHI | {"rope_parameters": BASE | LONG}),
    "gemma3": (tiny.tiny_gemma3, {}),
    "gemma3-linear": (
        tiny.tiny_gemma3,
        {"rope_parameters": {"full_attention": BASE | {"rope_type": "linear", "factor": 8.0}}},
    ),
    "qwen3_next": (tiny.tiny_qwen3_next, {}),
    "qwen2_5_vl": (tiny.tiny_qwen2_5_vl, {}),
    "qwen2_5_vl-sections": (tiny.tiny_qwen2_5_vl, scaled("default", **SECTIONS)),
    "qwen2_5_vl-yarn": (
        tiny.tiny_qwen2_5_vl,
        scaled("yarn", factor=4.0, original_max_position_embeddings=LENGTH, **SECTIONS),
    ),
    "qwen3_vl": (tiny.tiny_qwen3_vl, {}),
    "qwen3_vl-sections": (tiny.tiny_qwen3_vl, scaled("default", mrope_interleaved=True, **SECTIONS)),
    "qwen3_vl-yarn": (
        tiny.tiny_qwen3_vl,
        scaled("yarn", factor=4.0, mrope_interleaved=True, original_max_position_embeddings=LENGTH, **SECTIONS),
    ),
}
CHANGING = ["dynamic", "longrope", "phi3-longrope"]


def build(name):
    builder, changes = CASES[name]
    return builder(**copy.deepcopy(changes))


def rope(model):
    return rope_of(model, family_of(model))


def rotated(model, keys, coordinates, length=0):
    """Keys [batch, kv_heads, keys, head_dim] as the model writes them at coordinates [axes, batch, keys].

    `length` stands for a longer sequence that the keys are a part of.
    """
    rotary = decoder_of(model).rotary_emb
    arguments = {"layer_type": "full_attention"} if hasattr(rotary, "full_attention_inv_freq") else {}
    places = coordinates if len(coordinates) == 3 else coordinates[0]
    places = torch.cat([places, torch.full_like(places[..., :1], length)], -1)
    cos, sin = rotary(keys, places, **arguments)
    return turned(rotary, keys, *(x[..., :-1, :] for x in (cos, sin)))


def draw(axes, high, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 2, 9, 16, generator=generator)
    return keys, *(torch.randint(max(high - 2_000, 0), high, (axes, 2, 9), generator=generator) for _ in range(2))


def angles_of(found, coordinates, frequencies):
    """Angles for 2 heads that share their coordinates."""
    return angles(coordinates[:, :, None].expand(-1, -1, 2, -1), frequencies, found.axis)


@pytest.mark.parametrize("high", [LENGTH, 4_000, 102_000])
@pytest.mark.parametrize("name", CASES)
def test_turned_key_equals_the_key_computed_at_the_new_place(name, high):
    model = build(name)
    found = rope(model)
    keys, old, new = draw(found.axes, high, seed=high)
    written, expected = rotated(model, keys, old, high), rotated(model, keys, new, high)
    frequencies = found.frequencies()
    turned = turn_keys(written, angles_of(found, new, frequencies) - angles_of(found, old, frequencies))
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(written, expected, atol=0.1)


@pytest.mark.parametrize("name", CHANGING)
def test_keys_of_short_sequences_turn_onto_the_frequencies_of_long_ones(name):
    model = build(name)
    found, rotary = rope(model), decoder_of(model).rotary_emb
    keys, old, new = draw(1, LENGTH - 1, seed=0)
    written, then, scaling = rotated(model, keys, old), found.frequencies(), rotary.attention_scaling
    expected, now = rotated(model, keys, new, length=5 * LENGTH), found.frequencies()
    assert not torch.allclose(then, now, rtol=0.05)
    turned = turn_keys(written, angles_of(found, new, now) - angles_of(found, old, then))
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-5)
    stale = turn_keys(written, angles_of(found, new, now) - angles_of(found, old, now))
    assert not torch.allclose(stale, expected, atol=0.1)
    assert rotary.attention_scaling == scaling
    rotated(model, keys, new)
    assert torch.equal(found.frequencies(), then), "and back, for the next short sequence"


@pytest.mark.parametrize("name", ["yarn", "longrope", "phi3-longrope"])
def test_these_variants_scale_their_keys(name):
    assert decoder_of(build(name)).rotary_emb.attention_scaling > 1.05


@pytest.mark.parametrize("name", CASES)
def test_which_variants_change(name):
    assert rope(build(name)).changes == (name in CHANGING)


def test_partial_rotation_is_seen():
    assert len(rope(build("phi3-partial")).frequencies()) == 4
    assert len(rope(build("qwen3_next")).frequencies()) == 2


def test_gemma_uses_the_frequencies_of_full_attention():
    model = build("gemma3-linear")
    rotary = decoder_of(model).rotary_emb
    assert torch.equal(rope(model).frequencies(), rotary.full_attention_inv_freq)
    assert not torch.allclose(rope(model).frequencies(), rotary.sliding_attention_inv_freq, rtol=0.5)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_gemma_may_change_its_full_attention_only(rope_type):
    kinds = {"full_attention": BASE | (LONG if rope_type == "longrope" else DYNAMIC), "sliding_attention": dict(BASE)}
    assert rope(tiny.tiny_gemma3(rope_parameters=copy.deepcopy(kinds))).changes
    swapped = {"full_attention": kinds["sliding_attention"], "sliding_attention": kinds["full_attention"]}
    assert not rope(tiny.tiny_gemma3(rope_parameters=swapped)).changes


def test_copying_shares_the_model():
    found = rope(build("longrope"))
    assert copy.deepcopy({"held": found})["held"].rotary is found.rotary


def test_frequencies_are_full_precision_whatever_the_model():
    model = tiny.tiny_llama().bfloat16()
    assert rope(model).frequencies().dtype == torch.float32


def test_a_decoder_without_inverse_frequencies_is_refused():
    model = tiny.tiny_llama()
    del decoder_of(model).rotary_emb.inv_freq
    with pytest.raises(ValueError, match=r"needs a decoder with rotary_emb\.inv_freq, llama has none"):
        rope(model)


@pytest.mark.parametrize("kind", ["mrope", "mrope_interleaved", "interleaved"])
def test_axes_that_the_model_does_not_name_are_refused(kind):
    with pytest.raises(ValueError, match=f"expected mrope_section None .* 8 frequencies as '{kind}'"):
        rope_of(tiny.tiny_llama(), Family(rope=kind))


def test_axes_of_a_model_are_not_forgotten():
    with pytest.raises(ValueError, match=r"expected mrope_section \[4, 2, 2\] .* as '1d'"):
        rope_of(tiny.tiny_qwen3_vl(), Family())
