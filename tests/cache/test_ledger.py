"""The ledger against an independent walk over every tensor a cache holds."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from retention import POLICIES, Budget, CacheConfig, EvictingCache, evicting
from retention.cache.ledger import physical_bytes
from retention.policies.collect import statistics_of
from retention.policies.snapkv import SnapKV
from tests.cache.helpers import (
    COLLECTED,
    EVERY,
    EVICTING,
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    Conversation,
    gates_of,
    left_padded,
    model_of,
    policy_with,
    small,
    tokens,
)
from tests.tiny import tiny_llama

SMALL = 1024
ENTRY = 2 * HEAD_DIM * 4
PROMPT = left_padded(tokens(2, 96, seed=1), [96, 60])
EVERYTHING = {"extra_collectors": COLLECTED, "packed": True}


def walk(found: Any, storages: dict[int, int], visited: set[int]) -> dict[int, int]:
    """Bytes by storage of every tensor reachable through attributes, lists and dicts; rotary frequencies aside."""
    if id(found) in visited:
        return storages
    visited.add(id(found))
    if isinstance(found, Tensor):
        storage = found.untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes()
    elif isinstance(found, dict):
        for name, value in found.items():
            if name not in ("rope", "inv_freq"):
                walk(value, storages, visited)
    elif isinstance(found, list | tuple | set):
        for value in found:
            walk(value, storages, visited)
    elif hasattr(found, "__dict__") and not isinstance(found, type | torch.nn.Module):
        walk(vars(found), storages, visited)
    return storages


def reachable(*roots: Any) -> int:
    return sum(walk(list(roots), {}, set()).values())


def assert_ledger(cache: EvictingCache) -> None:
    """Equal but for control tensors smaller than a KiB in sum."""
    assert abs(cache.bytes().total - reachable(cache)) < SMALL


def assert_exact(cache: EvictingCache, entries: int, padding: int = 0) -> None:
    """Keys and values of so many entries, and nothing reserved beside them but for padding."""
    physical = cache.bytes().physical
    assert physical["keys"] == physical["values"] == entries * ENTRY // 2
    assert physical["slack"] == padding * (ENTRY + 4 * (physical["scores"] > 0))


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("name", EVERY)
def test_the_ledger_equals_the_tensors(name, scope):
    model, config = model_of(), CacheConfig(Budget(32.0), allocator=scope)
    with evicting(model, small(name), config, gates=gates_of()) as cache:
        told = Conversation(model, cache)
        with cache.hold():
            told.feed(*PROMPT)
        assert_ledger(cache)
        assert_exact(cache, (96 + 60) * LAYERS * KV_HEADS, padding=36 * LAYERS * KV_HEADS)
        full = cache.bytes()
        cache.evict()
        assert_ledger(cache)
        ledger = cache.bytes()
        if name != "full":
            assert_exact(cache, int(cache.kept().sum()))
            assert ledger.total < 0.5 * full.total
            assert (ledger.logical["keys"], ledger.logical["values"]) == (ledger.physical["keys"],) * 2
            assert ledger.logical_total <= ledger.total
        told.feed(tokens(2, 1))
        assert_ledger(cache)
        told.feed(tokens(2, 30, seed=2))
        assert_ledger(cache)
        assert cache.bytes().peak >= cache.bytes().total
        assert cache.bytes().peak >= 2 * 96 * LAYERS * KV_HEADS * ENTRY
        assert cache.bytes().peak >= full.total


def test_padding_is_held_until_it_is_evicted():
    """Physical bytes count what is allocated, padding as slack; logical ones only entries."""
    model = model_of()
    with evicting(model, small("knorm"), CacheConfig(Budget(200.0))) as cache:
        Conversation(model, cache).feed(*PROMPT)
        ledger = cache.bytes()
    heads = LAYERS * KV_HEADS
    assert ledger.logical["keys"] == ledger.physical["keys"] == (96 + 60) * heads * ENTRY // 2
    assert ledger.physical["slack"] == 36 * heads * ENTRY


def test_half_precision_takes_half_the_bytes():
    import copy

    model = copy.deepcopy(model_of()).to(torch.bfloat16)
    with evicting(model, small("knorm"), CacheConfig(Budget(32.0))) as cache:
        Conversation(model, cache).feed(*PROMPT)
        physical = cache.bytes().physical
    assert physical["keys"] == physical["values"] == 2 * 32 * LAYERS * KV_HEADS * HEAD_DIM * 2


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("name", EVICTING)
def test_keys_and_values_take_the_bytes_of_the_budget(name, scope):
    model, config = model_of(), CacheConfig(Budget(32.0), allocator=scope)
    with evicting(model, small(name), config, gates=gates_of()) as cache:
        Conversation(model, cache).feed(*PROMPT)
        physical = cache.bytes().physical
        counts = cache.kept()
    if scope == "global" and name not in ("streaming_llm", "oracle", "attention_oracle", "lagkv"):
        assert counts.unique().numel() > 1
    budget = 2 * 32 * LAYERS * KV_HEADS * ENTRY
    assert abs(physical["keys"] + physical["values"] - budget) <= 0.03 * budget


def live(before: dict[int, Tensor]) -> int:
    """Bytes of all key- or value-shaped tensors of this process that were not there before."""
    found = (x for x in gc.get_objects() if type(x) is Tensor and x.dtype == torch.float32 and x.shape[-1:] == (16,))
    storages = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in found)}
    return sum(size for place, size in storages.items() if place not in before)


@pytest.mark.parametrize("chunk", [None, 24])
def test_the_peak_covers_what_really_lives_while_a_policy_scores(chunk):
    """Stored tensors and padded views exist together; found by the garbage collector, not through the cache."""
    model, held = model_of(), []
    gc.collect()
    before = {x.untyped_storage().data_ptr(): x for x in gc.get_objects() if type(x) is Tensor}

    def score(kv: Any) -> Tensor:
        held.append(live(before))
        return -kv.keys.norm(dim=-1)

    config = CacheConfig(Budget(32.0), allocator="global", prefill_chunk=chunk)
    with evicting(model, policy_with(score), config) as cache:
        Conversation(model, cache).feed(*PROMPT)
        kv = sum(cache.bytes().physical[item] for item in ("keys", "values", "slack"))
        assert abs(live(before) - kv) < SMALL
    assert len(held) == LAYERS * (1 if chunk is None else 3)
    assert max(held) > kv
    assert cache.bytes().peak >= max(held) - SMALL


@pytest.mark.parametrize("name", EVICTING)
def test_a_fork_with_another_policy_holds_no_statistics_of_others(name):
    model, config = model_of(), CacheConfig(Budget(32.0))
    with evicting(model, small("full"), config, gates=gates_of(), **EVERYTHING) as source:
        Conversation(model, source).feed(*PROMPT)
        assert source.bytes().physical["statistics"] > 0
        assert source.bytes().physical["scores"] > 0
        twin = source.fork(small(name), config)
        physical = twin.bytes().physical
        names = {key for layer in twin.evicting_layers for key in layer.observed}
        assert names == statistics_of(POLICIES[name]().collectors) - {"second_pass", "answer_pass"}
        assert (physical["statistics"] > 0) == bool(names or twin.tokens.inputs.parts)
        assert bool(twin.tokens.inputs.parts) == (name == "kvzip")
        assert (physical["scores"] > 0) == POLICIES[name]().needs_gates
        assert_ledger(twin)
        assert twin.bytes().total <= twin.bytes().peak < source.bytes().peak
        twin.evict()
        assert_ledger(twin)
        assert_exact(twin, 2 * 32 * LAYERS * KV_HEADS)


def test_shared_storage_counts_once():
    base = torch.zeros(100)
    rows = physical_bytes({"keys": [base, base[:10]], "values": [base.view(10, 10), torch.zeros(3)]})
    assert rows["keys"] == 400
    assert rows["values"] == 12


def test_window_policies_hold_only_the_rows_they_read():
    model, ids = tiny_llama(), torch.arange(40)[None] % 90
    rows = {}
    with evicting(model, SnapKV(window_size=8)) as own, own.hold():
        model(input_ids=ids, past_key_values=own)
        rows["alone"] = own.evicting_layers[0].observed["window_rows"].shape[2]
    with evicting(model, POLICIES["full"](), extra_collectors=("window_rows",)) as shared:
        model(input_ids=ids, past_key_values=shared)
        fork = shared.fork(SnapKV(window_size=8))
        rows["shared"] = shared.evicting_layers[0].observed["window_rows"].shape[2]
        rows["fork"] = fork.evicting_layers[0].observed["window_rows"].shape[2]
    assert rows == {"alone": 8, "shared": 40, "fork": 8}
    assert fork.bytes().physical["statistics"] == own.bytes().physical["statistics"]
