"""Rotating cached keys against transformers' own rotary embedding."""

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from retention.ops.rope import rotate_keys

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}


def embedding(name):
    if name == "qwen3":
        return modeling_qwen3.Qwen3RotaryEmbedding(Qwen3Config(**SIZES)), modeling_qwen3.apply_rotary_pos_emb
    scaled = {"llama": {}, "llama3": {"rope_parameters": LLAMA3}, "yarn": {"rope_parameters": YARN}}[name]
    return modeling_llama.LlamaRotaryEmbedding(LlamaConfig(**SIZES | scaled)), modeling_llama.apply_rotary_pos_emb


def draw_keys(seed=0):
    return torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(seed))


def written_at(name, keys, positions):
    rotary, apply = embedding(name)
    cos, sin = rotary(keys, positions)
    return apply(keys, keys, cos, sin)[1]


@pytest.mark.parametrize("name", ["qwen3", "llama", "llama3", "yarn"])
def test_rotated_key_equals_the_key_computed_at_the_new_position(name):
    keys = draw_keys()
    old = torch.tensor([[0, 1, 5, 80, 81, 300, 1999], [2, 3, 4, 5, 6, 7, 8]])
    new = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [900, 3, 4, 5, 60, 70, 80]])
    delta = (new - old)[:, None].expand(2, 3, 7)
    found = rotate_keys(written_at(name, keys, old), delta, embedding(name)[0].inv_freq)
    torch.testing.assert_close(found, written_at(name, keys, new), rtol=1e-4, atol=5e-4)


def test_each_head_may_move_by_its_own_amount():
    keys, old = draw_keys(), torch.arange(7).expand(2, 7)
    delta = torch.randint(-50, 50, (2, 3, 7), generator=torch.Generator().manual_seed(1))
    found = rotate_keys(written_at("qwen3", keys, old), delta, embedding("qwen3")[0].inv_freq)
    for head in range(3):
        expected = written_at("qwen3", keys[:, head : head + 1], old + delta[:, head])
        torch.testing.assert_close(found[:, head : head + 1], expected, rtol=1e-4, atol=1e-4)


def test_rotating_there_and_back_returns_the_key():
    keys, inv_freq = draw_keys(), embedding("qwen3")[0].inv_freq
    delta = torch.randint(-3000, 3000, (2, 3, 7), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        rotate_keys(rotate_keys(keys, delta, inv_freq), -delta, inv_freq), keys, rtol=1e-5, atol=1e-5
    )


def test_two_turns_are_one_turn_by_their_sum():
    keys, inv_freq = draw_keys(), embedding("llama")[0].inv_freq
    one, two = (torch.full((2, 3, 7), n) for n in (-700, 45))
    twice = rotate_keys(rotate_keys(keys, one, inv_freq), two, inv_freq)
    torch.testing.assert_close(twice, rotate_keys(keys, one + two, inv_freq), rtol=1e-5, atol=1e-5)


def test_no_move_changes_no_bit():
    keys = draw_keys()
    assert torch.equal(rotate_keys(keys, torch.zeros(2, 3, 7, dtype=torch.long), embedding("llama")[0].inv_freq), keys)


def test_dimensions_beyond_the_frequencies_stay_as_they_are():
    keys, delta = draw_keys(), torch.full((2, 3, 7), 11)
    inv_freq = 1.0 / 10_000.0 ** (torch.arange(0, 8, 2) / 8)
    found = rotate_keys(keys, delta, inv_freq)
    assert torch.equal(found[..., 8:], keys[..., 8:])
    torch.testing.assert_close(found[..., :8], rotate_keys(keys[..., :8], delta, inv_freq))
    assert not torch.allclose(found[..., :8], keys[..., :8], atol=0.1)


def test_large_moves_keep_fp32_accuracy():
    keys, inv_freq = draw_keys(), embedding("llama")[0].inv_freq
    delta = torch.full((2, 3, 7), 1_000_003)
    angle = delta[..., None].double() * inv_freq.double()
    turned = torch.view_as_complex(torch.stack([keys[..., :8], keys[..., 8:]], -1).double().contiguous())
    turned = torch.view_as_real(turned * torch.polar(torch.ones_like(angle), angle))
    expected = torch.cat([turned[..., 0], turned[..., 1]], -1).float()
    torch.testing.assert_close(rotate_keys(keys, delta, inv_freq), expected, rtol=1e-5, atol=1e-5)


def test_the_dtype_of_the_keys_is_kept():
    keys, delta = draw_keys().bfloat16(), torch.full((2, 3, 7), 5)
    found = rotate_keys(keys, delta, embedding("llama")[0].inv_freq)
    assert found.dtype == torch.bfloat16
    exact = rotate_keys(keys.float(), delta, embedding("llama")[0].inv_freq)
    torch.testing.assert_close(found.float(), exact, rtol=0.01, atol=0.01)
