"""What allocators promise, counted in a real cache: over prompts, turns and decoding."""

import pytest
import torch

from retention import Budget, CacheConfig, evicting
from retention.budget import ALLOCATORS, AllocationInput
from tests.cache.helpers import KV_HEADS, LAYERS, Conversation, gates_of, left_padded, model_of, small, tokens
from tests.tiny import IMAGE_SIZE, IMAGE_TOKEN, IMAGE_TOKENS

HEADS = LAYERS * KV_HEADS
PROMPT = left_padded(tokens(2, 40, seed=1), [40, 31])
NAMES = ["knorm", "h2o", "snapkv", "db_trim_kv"]


def kept(name, config, *parts, family="llama", **extra):
    with evicting(model_of(family), small(name), config, gates=gates_of(family)) as cache:
        told = Conversation(model_of(family), cache)
        for ids, mask in parts:
            told.feed(ids, mask, **extra)
            extra = {}
        return cache.kept(), cache


@pytest.mark.parametrize("name", NAMES)
def test_the_pyramid(name):
    budget, beta = 12, 4.0
    window = small(name).recent(budget)
    last = window + (budget - window) / beta
    first = 2 * budget - last
    got, _ = kept(name, CacheConfig(Budget(float(budget)), allocator="pyramid", pyramid_beta=beta), PROMPT)
    assert (got.sum(0) == budget * LAYERS).all(), "the budget on average"
    for layer, wanted in enumerate((first, budget, last)):
        assert ((got[layer] - wanted).abs() < 1).all()
    assert (got == got[:, :1, :1]).all()


def test_a_steep_pyramid_over_two_turns():
    config = CacheConfig(Budget(12.0), allocator="pyramid", evict_every=2)
    got, _ = kept("knorm", config, PROMPT, *((tokens(2, 1, seed=i), None) for i in range(4)))
    assert (got.sum(0) == 12 * LAYERS).all()
    assert got[:, 0, 0].tolist() == sorted(got[:, 0, 0].tolist(), reverse=True)
    assert got[0, 0, 0] > 20


@pytest.mark.parametrize("weights", [[1.0, 2.0, 3.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
def test_weights_of_layers(weights):
    got, _ = kept("knorm", CacheConfig(Budget(10.0), allocator="layers", layer_weights=weights), PROMPT)
    share = torch.tensor(weights) / sum(weights) * 30
    assert ((got.float() - share[:, None, None]).abs() < 1).all()
    assert (got.sum(0) == 30).all()


@pytest.mark.parametrize("share", [None, 0.0, 0.25, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_modalities_are_counted_apart(name, share):
    ids = tokens(1, 24, seed=5)
    for start in (3, 9, 15):
        ids[:, start : start + IMAGE_TOKENS] = IMAGE_TOKEN
    pixels = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    config = CacheConfig(Budget(8.0), allocator="modality", visual_share=share)
    got, cache = kept(name, config, (ids, None), family="llava", pixel_values=pixels)
    assert (got == 8).all()
    table = cache.kept_table()[:, 0]
    visual = (table & (ids[0] == IMAGE_TOKEN)).sum(-1)
    assert (visual == {None: 4, 0.0: 0, 0.25: 2, 1.0: 8}[share]).all()


@pytest.mark.parametrize("allocator", ["pyramid", "layers", "quota", "uniform"])
def test_counts_are_the_allocators_own(allocator):
    """A second padded turn: the allocator sees what is there before it, and the cache holds what it says."""
    options = {"layer_weights": [3.0, 1.0, 2.0], "quota": [[1.0, 3.0], [2.0, 2.0], [4.0, 1.0]]}
    config = CacheConfig(Budget(9.0), allocator=allocator, **options)
    with evicting(model_of(), small("knorm"), config) as cache:
        told = Conversation(model_of(), cache)
        for part in (PROMPT, left_padded(tokens(2, 9, seed=2), [2, 9])):
            with cache.hold():
                told.feed(*part)
            there = cache.kept()
            cache.evict()
            given = AllocationInput(
                there,
                quota=torch.tensor(options["quota"]),
                layer_weights=torch.tensor(options["layer_weights"]),
                window=torch.zeros(2, dtype=torch.long),
            )
            assert torch.equal(cache.kept(), ALLOCATORS[allocator](torch.tensor([9, 9]), given))


def test_a_floor_in_the_pool():
    got, _ = kept("db_trim_kv", CacheConfig(Budget(6.0), min_per_head=3), PROMPT)
    assert (got >= 3).all()
    assert got.sum((0, 2)).tolist() == [6 * HEADS] * 2
