"""Nearness to the text before: against its twin, in chunks, causal."""

import pytest
import torch

from retention.ops.relevance import naive_text_relevance, text_relevance


def draw(batch=2, tokens=11, hidden=5):
    generator = torch.Generator().manual_seed(0)
    text = torch.rand(batch, tokens, generator=generator) < 0.5
    text[:, 0] = torch.tensor([True, False])
    return torch.randn(batch, tokens, hidden, generator=generator), text


def test_it_equals_the_naive_twin():
    hidden, text = draw()
    found, _ = text_relevance(hidden, text)
    expected = torch.stack([naive_text_relevance(*row) for row in zip(hidden, text, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found[:, 0] == 0).all(), "no text came before the first token"
    assert found[:, 6:].abs().min() > 0


@pytest.mark.parametrize("cut", [1, 4, 10])
def test_chunks_give_what_the_whole_gives(cut):
    hidden, text = draw()
    whole, heard = text_relevance(hidden, text)
    first, so_far = text_relevance(hidden[:, :cut], text[:, :cut])
    second, end = text_relevance(hidden[:, cut:], text[:, cut:], so_far)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(end, heard)
    torch.testing.assert_close(heard, (hidden * text[..., None]).sum(1))
    assert so_far.untyped_storage().nbytes() == so_far.numel() * 4, "the chunk is not kept alive"


def test_a_token_knows_nothing_of_itself_and_of_what_comes_after():
    hidden, text = draw()
    changed = hidden.clone()
    changed[:, 6:] *= torch.randn(2, 5, 1, generator=torch.Generator().manual_seed(1)).sign() * 3
    before, after = (text_relevance(x, text)[0] for x in (hidden, changed))
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 0.05
