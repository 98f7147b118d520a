"""Physical eviction equals the full cache with the dropped entries hidden, and re-rotated where packed."""

import pytest
import torch

from retention import POLICIES, Budget, CacheConfig, evicting
from tests.cache.helpers import (
    EVERY,
    EVICTING,
    KV_HEADS,
    LAYERS,
    QUOTA,
    Conversation,
    Oracle,
    gap,
    gates_of,
    left_padded,
    model_of,
    policy_with,
    small,
    tokens,
)
from tests.tiny import IMAGE_SIZE, IMAGE_TOKEN, IMAGE_TOKENS

BUDGET, STEPS = 6, 6
SCOPES = {
    "uniform": {"allocator": "uniform"},
    "global": {"allocator": "global"},
    "quota": {"allocator": "quota", "quota": QUOTA},
}
PROMPT = left_padded(tokens(2, 20, seed=1), [20, 13])
QUESTION = left_padded(tokens(2, 7, seed=2), [4, 7])
ANSWERS = tokens(2, 2 * STEPS, seed=3)


@pytest.mark.parametrize("page", [2, 32], indirect=True)
@pytest.mark.parametrize("positions", ["original", "packed"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", EVERY)
def test_two_evictions_equal_the_masked_full_cache(name, scope, positions):
    model, oracle, packed = model_of(), Oracle(), positions == "packed"
    config = CacheConfig(Budget(float(BUDGET)), positions=positions, on_evict="drop", **SCOPES[scope])
    with evicting(model, small(name), config, gates=gates_of()) as cache:
        told = Conversation(model, cache)
        for turn, (ids, mask) in enumerate((PROMPT, QUESTION)):
            assert gap(told.feed(ids, mask), oracle.feed(ids, mask), mask) < 1e-5
            table = cache.kept_table()
            if name != "full":
                assert table.sum((0, 2, 3)).tolist() == [BUDGET * LAYERS * KV_HEADS] * 2
            oracle.drop(table, packed=packed and name != "full")
            for step in range(STEPS):
                ids = ANSWERS[:, turn * STEPS + step, None]
                assert gap(told.feed(ids), oracle.feed(ids)) < 1e-5


@pytest.mark.parametrize("positions", ["original", "packed"])
@pytest.mark.parametrize("family", ["qwen3", "llava"])
def test_other_families(family, positions):
    model, oracle = model_of(family), Oracle(family)
    ids, mask = tokens(2, 16, seed=4), torch.ones(2, 16, dtype=torch.long)
    extra = {}
    if family == "llava":
        ids[:, 3 : 3 + IMAGE_TOKENS] = IMAGE_TOKEN
        extra["pixel_values"] = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    config = CacheConfig(Budget(5.0), positions=positions)
    with evicting(model, small("db_trim_kv"), config, gates=gates_of(family)) as cache:
        told = Conversation(model, cache)
        assert gap(told.feed(ids, mask, **extra), oracle.feed(ids, mask, **extra)) < 1e-5
        oracle.drop(cache.kept_table(), packed=positions == "packed")
        for step in range(STEPS):
            ids = ANSWERS[:, step, None]
            assert gap(told.feed(ids), oracle.feed(ids)) < 1e-5


@pytest.mark.parametrize("positions", ["original", "packed"])
@pytest.mark.parametrize("name", [n for n in EVICTING if POLICIES[n].evicts_while_decoding])
def test_eviction_every_third_token(name, positions):
    model, oracle = model_of(), Oracle()
    config = CacheConfig(Budget(float(BUDGET)), positions=positions, evict_every=3, on_evict="drop")
    with evicting(model, small(name), config, gates=gates_of()) as cache:
        told = Conversation(model, cache)
        ids, mask = PROMPT
        told.feed(ids, mask), oracle.feed(ids, mask)
        oracle.drop(cache.kept_table(), packed=positions == "packed")
        for step in range(2 * STEPS):
            ids = ANSWERS[:, step, None]
            assert gap(told.feed(ids), oracle.feed(ids)) < 1e-5
            if step % 3 == 2:
                table = cache.kept_table()
                assert table.sum((0, 2, 3)).tolist() == [BUDGET * LAYERS * KV_HEADS] * 2
                oracle.drop(table, packed=positions == "packed")


@pytest.mark.parametrize("positions", ["original", "packed"])
def test_a_layer_and_a_head_without_entries(positions):
    def score(kv):
        base = kv.positions.float() if kv.layer != 1 else torch.full(kv.positions.shape, -100.0)
        return base - 200.0 * torch.tensor([kv.layer == 0, 0.0])[None, :, None]

    model, oracle = model_of(), Oracle()
    policy = policy_with(score, allocator="global", selector="global")
    ids, mask = PROMPT
    with evicting(model, policy, CacheConfig(Budget(4.0), positions=positions)) as cache:
        told = Conversation(model, cache)
        for turn in range(2):
            told.feed(ids, mask), oracle.feed(ids, mask)
            kept = cache.kept()
            assert kept[1].sum() == 0
            assert kept[0, :, 0].sum() == 0
            assert kept.sum((0, 2)).tolist() == [24, 24]
            oracle.drop(cache.kept_table(), packed=positions == "packed")
            for step in range(STEPS):
                new = ANSWERS[:, turn * STEPS + step, None]
                assert gap(told.feed(new), oracle.feed(new)) < 1e-5
            ids, mask = QUESTION


def test_the_oracle_without_drops_is_the_stock_model():
    from transformers import DynamicCache

    model, oracle = model_of(), Oracle()
    stock = Conversation(model, DynamicCache(config=model.config))
    assert gap(stock.feed(*PROMPT), oracle.feed(*PROMPT), PROMPT[1]) < 1e-5
    assert gap(stock.feed(*QUESTION), oracle.feed(*QUESTION), QUESTION[1]) < 1e-5


def test_the_oracle_sees_a_single_wrong_entry():
    """The comparison above is sharp: hiding one entry more, or one place off, shows."""
    results = []
    for change in ("none", "hide", "shift"):
        oracle = Oracle()
        oracle.feed(*PROMPT)
        if change == "hide":
            oracle.hidden[1, 0, 1, 8] = True
        if change == "shift":
            oracle.place[1, 0, 1, 8] += 1
        results.append(oracle.feed(ANSWERS[:, :1]))
    assert gap(results[0], results[1]) > 1e-4
    assert gap(results[0], results[2]) > 1e-4
