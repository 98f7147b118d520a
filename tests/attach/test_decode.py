"""The decode path against SDPA over the padded view, for pages of any size, groups, padding and empty heads."""

import pytest
import torch
from torch.nn import functional as F

from retention import Budget, CacheConfig, evicting
from retention.attach.decode import decode_attention
from retention.cache import storage
from tests.cache.helpers import Conversation, left_padded, policy_with, tokens
from tests.tiny import tiny_llama

PROMPT = left_padded(tokens(2, 40, seed=1), [40, 29])
TAIL = left_padded(tokens(2, 5, seed=2), [5, 2])
GROUPS = {1: (2, 2), 2: (4, 2), 4: (8, 2)}
_MODELS = {}


def built(groups, dtype):
    if (groups, dtype) not in _MODELS:
        heads, kv_heads = GROUPS[groups]
        model = tiny_llama(num_attention_heads=heads, num_key_value_heads=kv_heads, initializer_range=0.15)
        _MODELS[groups, dtype] = model.to(dtype)
    return _MODELS[groups, dtype]


def reference(layer, query, scaling):
    """SDPA in fp32 over what `read` lays out, masked by `visible`."""
    keys, values = (x.float().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in layer.read())
    mask = layer.attention_mask(1, query.shape[1] // layer.owner.shape.num_kv_heads)
    return F.scaled_dot_product_attention(query.float(), keys, values, attn_mask=mask, scale=scaling)


def empty_heads(kv):
    """The first head of layer 0 and all of layer 1 lose to the others."""
    base = kv.positions.float() if kv.layer != 1 else torch.full(kv.positions.shape, -100.0)
    return base - 200.0 * torch.tensor([kv.layer == 0, 0.0])[None, :, None]


def ragged(kv):
    """Different heads and rows like different positions."""
    head = torch.arange(2)[None, :, None] + 3 * kv.layer
    return ((kv.positions * 7919 + head * 104729) % 97).float()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", [ragged, empty_heads])
@pytest.mark.parametrize("page", [2, 32])
@pytest.mark.parametrize("groups", GROUPS)
def test_decoding_equals_padded_attention(groups, page, score, dtype, padded, monkeypatch):
    monkeypatch.setattr(storage, "PAGE", page)
    model = built(groups, dtype)
    policy = policy_with(score, allocator="global", selector="global")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with evicting(model, policy, CacheConfig(Budget(17.0))) as cache, torch.no_grad():
        told = Conversation(model, cache)
        told.feed(*PROMPT)
        assert cache.kept().unique().numel() > 1
        assert (cache.evicting_layers[0].store.page_counts is not None) == (page == 2 or int(cache.kept()[0].max()) >= 32)  # fmt: skip
        with cache.hold():
            if padded:
                told.feed(*TAIL)
            for step in range(3):
                told.feed(tokens(2, 1, seed=step))
                for number, layer in enumerate(cache.evicting_layers):
                    generator = torch.Generator().manual_seed(10 * step + number)
                    query = torch.randn(2, 2 * groups, 1, 16, generator=generator).to(dtype)
                    got = decode_attention(layer, query, 0.4)
                    expected = reference(layer, query, 0.4)
                    assert got.dtype == dtype
                    assert (got.float() - expected).abs().max() < tolerance


@pytest.mark.parametrize("page", [2, 32])
def test_the_path_is_chosen_by_the_storage(page, monkeypatch):
    """Equal heads and heads below a page stay dense; a wrong column would show in the test above."""
    monkeypatch.setattr(storage, "PAGE", page)
    model = built(2, torch.float32)
    for score, allocator, paged in ((ragged, "uniform", False), (ragged, "global", page == 2)):
        with evicting(model, policy_with(score), CacheConfig(Budget(6.0), allocator=allocator)) as cache:
            Conversation(model, cache).feed(*PROMPT)
            assert all((layer.store.owner is not None) == paged for layer in cache.evicting_layers)


def test_a_hole_or_padding_that_showed_would_be_seen():
    """The comparison is sharp: one more or one less visible column changes the result."""
    model = built(2, torch.float32)
    policy = policy_with(ragged, allocator="global", selector="global")
    with evicting(model, policy, CacheConfig(Budget(7.0))) as cache, torch.no_grad(), cache.hold():
        told = Conversation(model, cache)
        told.feed(*PROMPT)
        cache.evict()
        told.feed(*TAIL)
        told.feed(tokens(2, 1))
        layer = cache.evicting_layers[0]
        query = torch.randn(2, 4, 1, 16, generator=torch.Generator().manual_seed(0))
        expected, visible = reference(layer, query, 0.4), layer.buffer_visible()
        assert not visible.all()
        for hidden in torch.nonzero(~visible).tolist():
            wrong = visible.clone()
            wrong[tuple(hidden)] = True
            layer.buffer_visible = lambda wrong=wrong: wrong
            assert (decode_attention(layer, query, 0.4) - expected).abs().max() > 1e-3
            del layer.buffer_visible
