"""Delayed attention and what keys receive: fast forms against their written-out twins."""

import pytest
import torch

from retention.ops import attention, blocks, evicted_attention, output_norms, received

ROWS, HEADS, KV_HEADS, COUNT, WIDTH = 2, 4, 2, 13, 8


def drawn(seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(ROWS, h, COUNT, WIDTH, generator=g) for h in (HEADS, KV_HEADS, KV_HEADS))
    valid = torch.arange(COUNT) >= torch.tensor([0, 4])[:, None]
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    return q, k, v, torch.randn(ROWS, KV_HEADS, COUNT, generator=g), valid, positions


@pytest.mark.parametrize("window", [0, 3, 50])
def test_delayed_attention_in_blocks_is_the_whole_one_with_its_gradients(monkeypatch, window):
    monkeypatch.setattr(blocks, "BLOCK", 5)
    results = []
    for function in (evicted_attention.naive_delayed_attention, evicted_attention.delayed_attention):
        q, k, v, log_keep, valid, positions = drawn()
        leaves = [x.requires_grad_() for x in (q, k, v, log_keep)]
        out = function(*leaves, window=window, scaling=0.3, positions=positions, valid=valid)
        (out * valid[:, None, :, None]).square().sum().backward()
        results.append([out[valid[:, None].expand(-1, HEADS, -1)], *(x.grad for x in leaves if x.grad is not None)])
    for truth, got in zip(*results, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-6)


def test_a_delayed_key_weighs_less_behind_the_window_only():
    q, k, v, log_keep, _, positions = drawn()
    got = evicted_attention.naive_delayed_attention(q, k, v, log_keep, window=3, scaling=0.3, positions=positions)
    for head in range(HEADS):
        for t in range(COUNT):
            logits = 0.3 * k[0, head // 2, : t + 1] @ q[0, head, t]
            logits[: max(0, t - 3)] += log_keep[0, head // 2, : max(0, t - 3)]
            torch.testing.assert_close(got[0, head, t], logits.softmax(-1) @ v[0, head // 2, : t + 1])


def test_without_a_delay_or_a_weight_attention_is_plain():
    q, k, v, log_keep, valid, positions = drawn()
    options = {"scaling": 0.3, "positions": positions, "valid": valid}
    plain = attention.naive_gated_attention(q, k, v, torch.zeros_like(log_keep), **options)
    for window, weight in ((COUNT, log_keep), (0, torch.zeros_like(log_keep))):
        got = evicted_attention.delayed_attention(q, k, v, weight, window=window, **options)
        torch.testing.assert_close(got[0], plain[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1, :, 4:], plain[1, :, 4:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalise", [True, False])
def test_asking_queries_alone_give_the_largest_of_all(monkeypatch, normalise):
    monkeypatch.setattr(received, "BLOCK", 3)
    q, k, v, _, valid, _ = drawn()
    asking = valid & (torch.rand(ROWS, COUNT, generator=torch.Generator().manual_seed(1)) < 0.6)
    more = {"normalise": normalise, "key_term": torch.randn(ROWS, HEADS, COUNT), "query_term": v[:, 0, :, 0]}
    truth = received.naive_largest_received(q, k, asking, valid, 0.3, **more)
    got = received.largest_received(q, k, asking, valid, 0.3, **more)
    torch.testing.assert_close(got, truth)
    assert torch.isfinite(got).any()
    nobody = received.largest_received(q, k, torch.zeros_like(asking), valid, 0.3)
    assert (nobody == float("-inf")).all()


def test_output_norms_by_squares_are_the_written_out_ones():
    _, _, v, _, _, _ = drawn()
    output = torch.randn(24, HEADS * WIDTH)
    written = output_norms.naive_l2_output_norms(v, output, HEADS)
    torch.testing.assert_close(output_norms.l2_output_norms(v, output, HEADS), written)
