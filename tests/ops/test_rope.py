"""Turning cached keys against transformers' own rotary embedding; `tests/models/test_rope.py` has every architecture."""

from itertools import pairwise

import torch
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from retention.ops.rope import angles, turn_keys

ROTARY = modeling_llama.LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16))
INV_FREQ, AXIS = ROTARY.inv_freq, torch.zeros(8, dtype=torch.long)
OLD = torch.tensor([[0, 1, 5, 80, 81, 300, 1999], [2, 3, 4, 5, 6, 7, 8]])
NEW = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [900, 3, 4, 5, 60, 70, 80]])
FAR = 100_000


def draw_keys(seed=0):
    return torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(seed))


def draw_positions(seed, high=FAR):
    return torch.randint(high, (2, 3, 7), generator=torch.Generator().manual_seed(seed))


def written_at(keys, positions):
    """Keys as the model writes them at `positions` [batch, keys]."""
    return modeling_llama.apply_rotary_pos_emb(keys, keys, *ROTARY(keys, positions))[1]


def angle_at(positions, inv_freq=INV_FREQ):
    """Angles at positions [batch, kv_heads, keys]."""
    return angles(positions[None], inv_freq, AXIS)


def moved(keys, old, new):
    return turn_keys(keys, angle_at(new) - angle_at(old))


def test_turned_key_equals_the_key_computed_at_the_new_position():
    keys = draw_keys()
    for old, new in [(OLD, NEW), (NEW, OLD), (OLD + FAR, NEW + FAR), (OLD + FAR, NEW), (OLD, NEW + 1_000_003)]:
        found = moved(written_at(keys, old), old[:, None].expand(2, 3, 7), new[:, None].expand(2, 3, 7))
        torch.testing.assert_close(found, written_at(keys, new), rtol=0, atol=1e-5)
        assert not torch.allclose(found, written_at(keys, old), atol=0.1)


def test_each_head_may_move_by_its_own_amount():
    keys, new = draw_keys(), draw_positions(1)
    found = moved(written_at(keys, OLD), OLD[:, None].expand(2, 3, 7), new)
    for head in range(3):
        expected = written_at(keys[:, head : head + 1], new[:, head])
        torch.testing.assert_close(found[:, head : head + 1], expected, rtol=0, atol=1e-5)


def test_there_and_back_returns_the_key():
    keys, old, new = draw_keys(), draw_positions(1), draw_positions(2)
    torch.testing.assert_close(moved(moved(keys, old, new), new, old), keys, rtol=0, atol=1e-5)


def test_many_moves_are_one_move():
    keys = found = draw_keys()
    places = [draw_positions(seed) for seed in range(40)]
    for old, new in pairwise(places):
        found = moved(found, old, new)
    torch.testing.assert_close(found, moved(keys, places[0], places[-1]), rtol=0, atol=2e-5)


def test_no_move_changes_no_bit():
    keys, places = draw_keys(), draw_positions(1)
    assert torch.equal(moved(keys, places, places), keys)


def test_each_frequency_turns_by_the_coordinate_of_its_axis():
    axis = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    coordinates = torch.tensor([[5, 6], [70, 80], [900, 1000]])
    expected = torch.stack([coordinates[a].double() * INV_FREQ[i].double() for i, a in enumerate(axis.tolist())], -1)
    found = angles(coordinates, INV_FREQ, axis)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_angles_are_rounded_as_transformers_rounds_them():
    places = torch.arange(FAR, FAR + 7)
    cos, _ = ROTARY(draw_keys(), places[None])
    torch.testing.assert_close(angles(places[None], INV_FREQ, AXIS).cos().float(), cos[0, :, :8], rtol=0, atol=1e-6)
    exact = (places[:, None].double() * INV_FREQ.double()).cos().float()
    assert not torch.allclose(exact, cos[0, :, :8], rtol=0, atol=1e-4)


def test_entries_may_be_written_under_frequencies_of_their_own():
    places, scale = draw_positions(1), 1 / draw_positions(2, high=9).add(1)
    mixed = angles(places[None], INV_FREQ * scale[..., None], AXIS)
    for index in [(0, 0, 0), (1, 2, 3), (1, 0, 6)]:
        alone = angles(places[index].view(1, 1), INV_FREQ * scale[index], AXIS)
        assert torch.equal(mixed[index], alone[0])


def test_dimensions_beyond_the_frequencies_stay_as_they_are():
    keys, delta = draw_keys(), angle_at(draw_positions(1))[..., :4]
    found = turn_keys(keys, delta)
    assert torch.equal(found[..., 8:], keys[..., 8:])
    assert torch.equal(found[..., :8], turn_keys(keys[..., :8], delta))
    assert not torch.allclose(found[..., :8], keys[..., :8], atol=0.1)


def test_a_turn_is_a_complex_product():
    keys, delta = draw_keys(), angle_at(draw_positions(1, high=1_000_003))
    turned = torch.complex(keys[..., :8].double(), keys[..., 8:].double()) * torch.polar(torch.ones(()).double(), delta)
    torch.testing.assert_close(
        turn_keys(keys, delta), torch.cat([turned.real, turned.imag], -1).float(), rtol=1e-5, atol=1e-5
    )


def test_the_dtype_of_the_keys_is_kept():
    keys, delta = draw_keys().bfloat16(), angle_at(draw_positions(1))
    found = turn_keys(keys, delta)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), turn_keys(keys.float(), delta), rtol=0.01, atol=0.01)
