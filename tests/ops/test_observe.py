"""Attention recomputed in rows and in blocks against the full softmax."""

import pytest
import torch

from retention.ops import observe
from retention.ops.observe import attention_rows, column_sums, naive_column_sums, peak_rows, window_rows

SCALING = 0.4


def draw(queries=11, keys=13, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 6, queries, 5, generator=g)
    k = torch.randn(2, 3, keys, 5, generator=g)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(2, 3, -1, -1).clone()
    visible[1, :, :, :4] = False
    visible[:, 2, :, 6] = False
    return q, k, visible


def full_softmax(q, k, visible):
    """Query head by query head, in float64: [batch, kv_heads, groups, queries, keys]."""
    out = torch.zeros(2, 3, 2, q.shape[2], k.shape[2], dtype=torch.double)
    for head in range(6):
        logits = SCALING * q[:, head].double() @ k[:, head // 2].double().transpose(-1, -2)
        weights = logits.exp() * visible[:, head // 2]
        out[:, head // 2, head % 2] = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return out


def test_rows_are_the_softmax_over_visible_keys():
    found = attention_rows(*draw(), SCALING)
    torch.testing.assert_close(found.double(), full_softmax(*draw()), rtol=1e-5, atol=1e-6)


def test_naive_column_sums_add_what_each_key_receives():
    found = naive_column_sums(*draw(), SCALING)
    torch.testing.assert_close(found.double(), full_softmax(*draw()).mean(2).sum(2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [1, 4, 11, 256])
def test_column_sums_in_blocks_equal_naive(monkeypatch, block):
    monkeypatch.setattr(observe, "BLOCK", block)
    torch.testing.assert_close(column_sums(*draw(), SCALING), naive_column_sums(*draw(), SCALING))


def test_column_sums_equal_naive_across_the_real_block_size():
    q, k, visible = draw(queries=observe.BLOCK + 3, keys=observe.BLOCK + 5)
    found = column_sums(q, k, visible, SCALING)
    torch.testing.assert_close(found, naive_column_sums(q, k, visible, SCALING), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "rows"), [(1, 1), (4, 4), (11, 11), (50, 11)])
def test_window_rows_are_the_last_rows_of_the_full_attention(window, rows):
    found = window_rows(*draw(), SCALING, window)
    expected = full_softmax(*draw()).mean(2)[:, :, -rows:]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_invisible_keys_receive_exactly_nothing():
    assert (column_sums(*draw(), SCALING)[1, :, :4] == 0).all()
    assert (column_sums(*draw(), SCALING)[:, 2, 6] == 0).all()
    assert (window_rows(*draw(), SCALING, 5)[1, :, :, :4] == 0).all()


def test_every_row_that_sees_something_sums_to_one_and_blind_rows_to_zero():
    q, k, visible = draw()
    visible[0, 1, 3] = False
    sums = attention_rows(q, k, visible, SCALING).sum(-1)
    expected = visible.any(-1).float()[:, :, None].expand_as(sums)
    assert (expected == 0).any()
    torch.testing.assert_close(sums, expected)


def test_half_precision_inputs_are_summed_in_fp32():
    q, k, visible = draw()
    found = column_sums(q.bfloat16(), k.bfloat16(), visible, SCALING)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, naive_column_sums(q.bfloat16().float(), k.bfloat16().float(), visible, SCALING))


def test_peak_rows_are_the_softmax_of_the_largest_logit_of_a_group():
    q, k, visible = draw()
    found = peak_rows(q, k, visible, SCALING, 4)
    logits = torch.stack([SCALING * q[:, head].double() @ k[:, head // 2].double().mT for head in range(6)], 1)
    weights = logits.unflatten(1, (3, 2)).amax(2)[:, :, -4:].exp() * visible[:, :, -4:]
    torch.testing.assert_close(found.double(), weights / weights.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)
