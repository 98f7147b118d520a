"""An evicting cache with a memory of what left."""

import pytest
import torch

from retention import Budget, CacheConfig, evicting
from retention.memory import RetentionMemory
from retention.memory.linear import Linear
from retention.memory.moment import Moment
from retention.memory.slots import Slots
from retention.models.family import model_shape
from tests.cache.helpers import Conversation, Oracle, gap, gates_of, left_padded, model_of, small, tokens
from tests.cache.test_ledger import assert_ledger

PROMPT = left_padded(tokens(2, 24, seed=1), [24, 15])
QUESTION = left_padded(tokens(2, 5, seed=2), [5, 3])
KINDS = [
    Slots(8), Moment("full"), Linear(features=4, hidden=8), Linear(features=4, hidden=8, readout="paper", entropy="across_heads"),
    Linear(features=4, hidden=8, transition="delta", readout="gated"),
]  # fmt: skip


def memory_of(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        memory = RetentionMemory(config, model_shape(model_of()))
        for name, parameter in memory.named_parameters():
            if "gain" in name or "weight_attention" in name:
                torch.nn.init.constant_(parameter, 0.5)
        return memory


def opened(config, budget=6.0, **settings):
    cache = CacheConfig(Budget(budget), on_evict="memory", **settings)
    return evicting(model_of(), small("knorm"), cache, gates=gates_of(), memory=memory_of(config))


def steps(told, count=3, start=3):
    return torch.cat([told.feed(tokens(2, 1, seed=start + i)) for i in range(count)], 1)


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_slots_for_everything_that_leaves_are_the_full_cache(scope):
    oracle = Oracle()
    with opened(Slots(64), allocator=scope) as cache:
        told = Conversation(model_of(), cache)
        told.feed(*PROMPT), oracle.feed(*PROMPT)
        assert cache.kept().sum() == 2 * 6 * 6
        for step in range(3):
            ids = tokens(2, 1, seed=step)
            assert gap(told.feed(ids), oracle.feed(ids)) < 1e-4
        ids, mask = QUESTION
        assert gap(told.feed(ids, mask), oracle.feed(ids, mask), mask) < 1e-4
        assert_ledger(cache)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_a_memory_that_holds_nothing_changes_nothing(config):
    results = []
    for on_evict in ("drop", "memory"):
        settings = CacheConfig(Budget(100.0), on_evict=on_evict)
        with evicting(model_of(), small("knorm"), settings, memory=memory_of(config)) as cache:
            told = Conversation(model_of(), cache)
            results.append((told.feed(*PROMPT), steps(told)))
            assert cache.bytes().physical["memory"] == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_padded_rows_recall_what_they_would_alone(config):
    with opened(config) as cache:
        told = Conversation(model_of(), cache)
        told.feed(*PROMPT)
        both = steps(told)
    with opened(config) as cache:
        told = Conversation(model_of(), cache)
        told.feed(PROMPT[0][1:, 9:])
        alone = torch.cat([told.feed(tokens(2, 1, seed=3 + i)[1:]) for i in range(3)], 1)
    assert gap(both[1:], alone) < 1e-4


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_forks_beams_and_files_carry_the_memory(config, tmp_path):
    with opened(config, evict_every=2) as cache:
        told = Conversation(model_of(), cache)
        told.feed(*PROMPT)
        state = memory_of(config).state_bytes() * 2
        assert cache.bytes().physical["memory"] == state
        cache.save(tmp_path / "c.safetensors")
        twin = Conversation(model_of(), cache.fork())
        twin.mask = told.mask
        expected = steps(told)
        assert gap(steps(twin), expected) < 1e-5
        assert_ledger(cache)
    with opened(config, evict_every=2) as again:
        again.restore(tmp_path / "c.safetensors")
        told = Conversation(model_of(), again)
        told.mask = PROMPT[1]
        assert gap(steps(told), expected) < 1e-5
    with opened(config) as cache:
        told = Conversation(model_of(), cache)
        told.feed(*PROMPT)
        swapped = cache.fork()
        swapped.reorder_cache(torch.tensor([1, 0]))
        rows = [layer.recalled for layer in swapped.evicting_layers]
        assert all(
            torch.equal(r[k], layer.recalled[k].flip(0))
            for r, layer in zip(rows, cache.evicting_layers, strict=True)
            for k in r
        )
        cache.reset()
        assert cache.bytes().physical["memory"] == 0


def test_a_fork_absorbs_what_a_cache_of_its_own_absorbs():
    """The policy in force, not the one that the prompt was read with, may be the only one that reads no rows."""
    memory = memory_of(Linear(features=4, hidden=8))
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    config, states = CacheConfig(Budget(6.0), on_evict="memory"), []
    with evicting(model_of(), small("knorm"), config, memory=memory) as cache:
        Conversation(model_of(), cache).feed(*PROMPT)
        states.append([layer.recalled for layer in cache.evicting_layers])
    with evicting(model_of(), small("full"), memory=memory, extra_collectors=("window_rows",)) as source:
        Conversation(model_of(), source).feed(*PROMPT)
        for policy in ("knorm", "snapkv"):
            fork = source.fork(small(policy), config)
            if policy == "snapkv":
                assert all(layer.observed["observers"].shape[2] == PROMPT[0].shape[1] for layer in fork.evicting_layers)
                continue
            fork.evict()
            states.append([layer.recalled for layer in fork.evicting_layers])
    for one, other in zip(*states, strict=True):
        assert all(torch.allclose(one[k], other[k], atol=1e-5) for k in one)


def test_the_retention_score_s_policy_needs_no_memory_and_fills_one_that_is_there():
    for memory in (None, memory_of(Slots(4))):
        with evicting(model_of(), small("retentive"), CacheConfig(Budget(6.0)), memory=memory) as cache:
            Conversation(model_of(), cache).feed(*PROMPT)
            assert (cache.bytes().physical["memory"] > 0) == (memory is not None)
    with (
        pytest.raises(ValueError, match="needs a memory"),
        evicting(model_of(), small("retentive"), CacheConfig(on_evict="memory")),
    ):
        pass


def test_bytes_pay_for_the_memory_first():
    sizes = []
    for on_evict in ("drop", "memory"):
        settings = CacheConfig(Budget(12_000.0, "bytes"), on_evict=on_evict)
        with evicting(model_of(), small("knorm"), settings, memory=memory_of(Slots(2))) as cache:
            Conversation(model_of(), cache).feed(tokens(1, 24))
            assert (
                cache.bytes().total - cache.bytes().physical["layout"] <= 12_000 + cache.bytes().physical["statistics"]
            )
            sizes.append(int(cache.kept().max()))
    assert sizes[0] - sizes[1] == pytest.approx(memory_of(Slots(2)).state_bytes() / (132 * 6), abs=1)


def test_a_memory_is_needed_to_keep_one():
    with (
        pytest.raises(ValueError, match="needs a memory"),
        evicting(model_of(), small("knorm"), CacheConfig(on_evict="memory")),
    ):
        pass
