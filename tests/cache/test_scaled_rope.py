"""Packed keys under scaled rotary embeddings, also where frequencies change past the original length."""

import copy

import pytest
import torch

from retention import Budget, CacheConfig, evicting
from retention.models import family_of, rope_of
from tests import tiny
from tests.cache.helpers import small, tokens
from tests.cache.truth import written

ORIGINAL = 16
BASE = {"rope_theta": 10_000.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONG = {"short_factor": [1.0 + i / 9 for i in range(8)], "long_factor": [4.0 + i for i in range(8)], "factor": 8.0}
KINDS = {
    "linear": (tiny.tiny_llama, {"factor": 3.0}, {}),
    "llama3": (tiny.tiny_llama, LLAMA3, {}),
    "yarn": (tiny.tiny_llama, {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}, {}),
    "dynamic": (tiny.tiny_llama, {"factor": 4.0}, {"max_position_embeddings": ORIGINAL}),
    "longrope": (tiny.tiny_llama, LONG | {"original_max_position_embeddings": ORIGINAL}, {}),
}
CHANGING = ("dynamic", "longrope")


def built(kind):
    builder, parameters, changes = KINDS[kind]
    rope = BASE | {"rope_type": kind} | copy.deepcopy(parameters)
    return builder(**changes, rope_parameters=rope)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_keys_equal_those_written_at_the_packed_place(kind, every):
    """A prompt within the original length, tokens past it, a question: evicted after each."""
    model = built(kind)
    frequencies = rope_of(model, family_of(model)).frequencies()
    config = CacheConfig(Budget(6.0), positions="packed", allocator="global", evict_every=every)
    with evicting(model, small("random"), config) as cache, written(model) as keys, torch.no_grad():
        model(tokens(2, 14, seed=1), past_key_values=cache)
        assert keys.check_packed(cache) < 1e-5
        for step in range(8):
            model(tokens(2, 1, seed=step), past_key_values=cache)
            if (step + 1) % every == 0:
                assert keys.check_packed(cache) < 1e-5
        model(tokens(2, 9, seed=2), past_key_values=cache)
        assert keys.check_packed(cache) < 1e-5
    changed = not torch.equal(frequencies, rope_of(model, family_of(model)).frequencies())
    assert changed == (kind in CHANGING)


@pytest.mark.parametrize("kind", CHANGING)
def test_entries_that_no_eviction_touched_carry_their_own_frequencies(kind):
    """Everything is held until long past the original length, so one eviction turns keys of several sets."""
    model = built(kind)
    with evicting(model, small("random"), CacheConfig(Budget(9.0), positions="packed")) as cache, written(model) as keys:  # fmt: skip
        with torch.no_grad(), cache.hold():
            model(tokens(1, 14, seed=1), past_key_values=cache)
            model(tokens(1, 5, seed=2), past_key_values=cache)
            for step in range(3):
                model(tokens(1, 1, seed=step), past_key_values=cache)
        assert len(cache.rotation.frequencies) > 1
        cache.evict()
        assert keys.check_packed(cache) < 1e-5
        assert len(cache.rotation.frequencies) == 1


def test_another_conversation_in_between_changes_nothing():
    """Frequencies live on the model; those of a cache are the ones its own forwards saw."""
    tables = []
    for interrupted in (False, True):
        model = built("longrope")
        config = CacheConfig(Budget(6.0), positions="packed")
        with evicting(model, small("random"), config) as cache, torch.no_grad():
            other = cache.fork()
            with cache.hold():
                model(tokens(1, 12, seed=1), past_key_values=cache)
            if interrupted:
                model(tokens(1, 40, seed=2), past_key_values=other)
            cache.evict()
            tables.append(cache.evicting_layers[2].state().keys)
    assert torch.equal(*tables)
