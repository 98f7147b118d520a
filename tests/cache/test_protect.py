"""Tokens a user asked to keep stay, whatever the policy, scope, chunks and number of evictions."""

import inspect

import pytest
import torch

from retention import Budget, CacheConfig, evicting
from retention.cache.tokens import Tokens
from tests.cache.helpers import (
    DECODING,
    EVICTING,
    KV_HEADS,
    LAYERS,
    Conversation,
    gates_of,
    left_padded,
    model_of,
    small,
    tokens,
)
from tests.cache.truth import one_of_each
from tests.tiny import IMAGE_SIZE, IMAGE_TOKEN, IMAGE_TOKENS

HEADS = LAYERS * KV_HEADS
LENGTHS = [20, 13]
PROMPT = left_padded(tokens(2, 20, seed=1), LENGTHS)
QUESTION = left_padded(tokens(2, 7, seed=2), [4, 7])
ANSWERS = tokens(2, 12, seed=3)
FREE = torch.ones(2, 1, dtype=torch.bool)


def wanted():
    """Columns of the prompt: for the second row two of its own tokens and one that is padding."""
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0, [2, 9, 10]] = True
    mask[1, [3, 8, 15]] = True
    return mask


PLACES = [[2, 9, 10], [1, 8]]
"""The same by sequence index."""


def opened(name, config, family="llama", **options):
    return evicting(model_of(family), small(name), config, gates=gates_of(family), **options)


def assert_held(cache, places=PLACES):
    table = cache.kept_table()
    for row, own in enumerate(places):
        assert table[:, row, :, own].all()


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("name", EVICTING)
def test_protected_tokens_survive_prompts_chunks_and_decoding(name, scope):
    every = 1 if name in DECODING else None
    config = CacheConfig(Budget(5.0), allocator=scope, prefill_chunk=7, evict_every=every)
    with opened(name, config) as cache:
        cache.protect(wanted())
        told = Conversation(model_of(), cache)
        told.feed(*PROMPT)
        assert_held(cache)
        for step in range(2):
            told.feed(ANSWERS[:, step, None])
            assert_held(cache)
        told.feed(*QUESTION)
        assert_held(cache)
        assert cache.kept().sum((0, 2)).tolist() == [5 * HEADS] * 2, "inside the budget"
        state = cache.evicting_layers[1].state()
        marked = [state.positions[row, 0][state.protected[row, 0]].tolist() for row in range(2)]
        assert marked == PLACES


@pytest.mark.parametrize("size", [6, 19])
def test_generate_in_chunks_of_its_own(size):
    """generate(prefill_chunk_size=...) feeds forwards of its own; one mask describes them all."""
    with opened("knorm", CacheConfig(Budget(5.0), evict_every=1)) as cache:
        cache.protect(wanted()[:1])
        ids = PROMPT[0][:1]
        model_of().generate(ids, past_key_values=cache, prefill_chunk_size=size, max_new_tokens=6, do_sample=False)
        assert_held(cache, PLACES[:1])
        assert (cache.kept() == 5).all()


def test_a_mask_is_used_up_and_tokens_behind_it_are_free():
    with opened("knorm", CacheConfig(Budget(6.0))) as cache:
        told = Conversation(model_of(), cache)
        cache.protect(wanted()[:, :11])
        told.feed(*PROMPT)
        assert cache.tokens.pending is None
        assert_held(cache, [[2, 9, 10], [1]])
        assert cache.tokens.wanted[1].sum() == 1, "padding is never protected"
        cache.protect(FREE)
        told.feed(*QUESTION)
        assert_held(cache, [[2, 9, 10], [1, 13]])
        assert cache.tokens.wanted.sum(1).tolist() == [3, 2], "the first row's question starts with padding"


def test_the_newest_mask_replaces_one_that_waits():
    with opened("knorm", CacheConfig(Budget(6.0))) as cache:
        cache.protect(~torch.zeros(2, 20, dtype=torch.bool))
        cache.protect(wanted())
        Conversation(model_of(), cache).feed(*PROMPT)
        assert_held(cache)


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_a_policys_own_window_gives_way(name):
    """Half of H2O's budget and SnapKV's window are recent tokens, unless others were asked for."""
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[:, 1:5] = True
    for places, newest in (((), 2), (range(1, 5), 0)):
        with opened(name, CacheConfig(Budget(4.0))) as cache:
            if places:
                cache.protect(mask)
            Conversation(model_of(), cache).feed(PROMPT[0][:1])
            table = cache.kept_table()[:, 0]
            assert table[..., list(places)].all()
            assert (table[..., 18:].sum(-1) >= newest).all()
            assert (cache.kept() == 4).all()


def test_forks_and_rows_keep_what_was_asked_for():
    with opened("knorm", CacheConfig(Budget(8.0))) as cache:
        cache.protect(wanted())
        told = Conversation(model_of(), cache)
        told.feed(*PROMPT)
        twin = cache.fork(small("random"), CacheConfig(Budget(3.0)))
        twin.batch_select_indices(torch.tensor([1, 0, 1]))
        twin.evict()
        assert_held(twin, [PLACES[i] for i in (1, 0, 1)])
        assert_held(cache)


def test_a_mask_that_waits_follows_its_rows():
    with opened("knorm", CacheConfig(Budget(4.0))) as cache:
        told = Conversation(model_of(), cache)
        told.feed(tokens(2, 3, seed=5))
        cache.protect(torch.tensor([[True, False, False], [False, True, False]]))
        cache.batch_select_indices(torch.tensor([1, 0]))
        told.feed(tokens(2, 12, seed=6))
        assert_held(cache, [[3 + 1], [3]])


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_protected_tokens_above_the_budget(scope):
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[:, :7] = True
    needed, budget = (7, 4) if scope == "uniform" else (7 * HEADS, 4 * HEADS)
    match = f"protected tokens alone exceed the budget: {needed} protected, budget for {budget}; .* fewer tokens"
    with opened("knorm", CacheConfig(Budget(4.0), allocator=scope)) as cache:
        cache.protect(mask)
        with pytest.raises(ValueError, match=match) as caught:
            Conversation(model_of(), cache).feed(PROMPT[0][:1])
        assert "\n" not in str(caught.value)


def test_wrong_masks_are_refused():
    with opened("knorm", CacheConfig(Budget(6.0))) as cache:
        told, protect = Conversation(model_of(), cache), inspect.unwrap(Tokens.protect)  # past the type checker
        for mask in (torch.ones(2, 20), torch.ones(20, dtype=torch.bool), torch.ones(2, 2, 20, dtype=torch.bool)):
            with pytest.raises(ValueError, match=r"expected a boolean mask \[batch, tokens\], got torch\.\w+ with \d"):
                protect(cache.tokens, mask)
        cache.protect(torch.ones(3, 20, dtype=torch.bool))
        with pytest.raises(ValueError, match="expected a mask of 2 rows, as the forward has, got 3; protect one row"):
            told.feed(*PROMPT)


def test_a_refused_mask_leaves_the_cache_as_it_was():
    with opened("knorm", CacheConfig(Budget(6.0))) as cache:
        told = Conversation(model_of(), cache)
        told.feed(*PROMPT)
        table, mask = cache.kept_table(), told.mask
        cache.protect(torch.ones(1, 7, dtype=torch.bool))
        with pytest.raises(ValueError, match="expected a mask of 2 rows"):
            told.feed(*QUESTION)
        assert torch.equal(cache.kept_table(), table)
        cache.protect(torch.zeros(2, 7, dtype=torch.bool))
        told.mask = mask
        told.feed(*QUESTION)
        assert (cache.kept() == 6).all()


# --- text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("name", one_of_each(EVICTING))
def test_text_of_prompts_survives(name, scope):
    model, ids = model_of("llava"), tokens(1, 20, seed=5)
    for start in (3, 9, 13):
        ids[:, start : start + IMAGE_TOKENS] = IMAGE_TOKEN
    pixels = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    text = torch.nonzero(ids[0] != IMAGE_TOKEN).flatten().tolist()
    every = 2 if name in DECODING else None
    config = CacheConfig(Budget(15.0), allocator=scope, protect_text=True, evict_every=every)
    with opened(name, config, "llava") as cache:
        told = Conversation(model, cache)
        told.feed(ids, pixel_values=pixels)
        assert_held(cache, [text])
        for step in range(4):
            told.feed(ANSWERS[:1, step, None])
            assert_held(cache, [text])
        told.feed(tokens(1, 3, seed=8))
        assert_held(cache, [[*text, 24, 25, 26]])
        assert cache.kept().sum() == 15 * HEADS
        assert not cache.tokens.prompted[20:24].any(), "decoded text is not protected"


def test_text_above_the_budget():
    with (
        opened("knorm", CacheConfig(Budget(6.0), protect_text=True)) as cache,
        pytest.raises(ValueError, match=r"exceed the budget: 20 protected, budget for 6; .*switch protect_text off"),
    ):
        Conversation(model_of(), cache).feed(PROMPT[0])
