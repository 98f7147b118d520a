"""Several gate sets on one attached model: each conversation is scored by its own."""

import pytest
import torch

from retention import Budget, CacheConfig, RetentionGates, evicting
from retention.attach.switch import use_gates
from retention.gates import GateSets
from retention.gates.trim import Trim
from retention.memory import RetentionMemory
from retention.memory.slots import Slots
from retention.policies.db_trim_kv import DBTrimKV
from retention.policies.full import Full
from tests.tiny import tiny_qwen3

TURNS = ([12, 40], [7, 9], [31, 8])
"""Seed and length of each turn's tokens."""
CONFIG = CacheConfig(budget=Budget(10), evict_every=4)
CONDITIONED = {"budget_conditioned": True, "budget_min": 2.0, "budget_max": 16.0}


@pytest.fixture(scope="module")
def model():
    return tiny_qwen3()


def make(model, seed, *, other_model=None, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gates = RetentionGates.for_model(Trim(init_half_life=20.0, **settings), other_model or model)
        for name, parameter in gates.named_parameters():
            if name.endswith("2.weight"):
                torch.nn.init.normal_(parameter, std=2.0)
    return gates.requires_grad_(False)


@pytest.fixture(scope="module")
def sets(model):
    return GateSets({"maths": make(model, 1), "chat": make(model, 2), "any": make(model, 3, **CONDITIONED)})


@torch.no_grad()
def turn(model, cache, number):
    seed, length = TURNS[number]
    ids = torch.randint(1, 99, (1, length), generator=torch.Generator().manual_seed(seed))
    return model(ids, past_key_values=cache).logits


def held(cache):
    return [(state.positions * state.valid).sort(-1).values for state in (x.state() for x in cache.evicting_layers)]


def alone(model, gates):
    """Logits of every turn, and what is held in the end, in a block with these gates."""
    with evicting(model, DBTrimKV(), CONFIG, gates=gates) as cache:
        return [turn(model, cache, i) for i in range(len(TURNS))], held(cache)


def equal(one, other):
    return len(one) == len(other) and all(
        x.shape == y.shape and torch.equal(x, y) for x, y in zip(one, other, strict=True)
    )


def test_conversations_with_their_own_gates_go_on_side_by_side(model, sets):
    expected = {name: alone(model, sets[name]) for name in sets}
    assert not equal(expected["maths"][1], expected["chat"][1])
    with evicting(model, DBTrimKV(), CONFIG, gates=sets["maths"]) as empty:
        caches = {name: use_gates(empty.fork(), sets[name]) for name in sets}
        logits = {name: [] for name in sets}
        for number in range(len(TURNS)):
            for name, cache in caches.items():
                logits[name].append(turn(model, cache, number))
        for name, cache in caches.items():
            assert equal(logits[name], expected[name][0])
            assert equal(held(cache), expected[name][1])


def test_forks_keep_the_gates_of_their_cache(model, sets):
    with evicting(model, DBTrimKV(), CONFIG, gates=sets["maths"]) as empty:
        cache = use_gates(empty.fork(), sets["chat"])
        turn(model, cache, 0)
        twin = cache.fork()
        for number in (1, 2):
            turn(model, twin, number)
    assert equal(held(twin), alone(model, sets["chat"])[1])


def test_a_cache_keeps_its_gates_in_a_later_block_of_others(model, sets):
    with evicting(model, DBTrimKV(), CONFIG, gates=sets["maths"]) as cache:
        first = turn(model, cache, 0)
    with evicting(model, DBTrimKV(), CONFIG, gates=sets["chat"]):
        later = [turn(model, cache, number) for number in (1, 2)]
    logits, kept = alone(model, sets["maths"])
    assert equal([first, *later], logits)
    assert equal(held(cache), kept)


def test_a_cache_that_holds_tokens_is_refused(model, sets):
    with evicting(model, DBTrimKV(), CONFIG, gates=sets["maths"]) as cache:
        turn(model, cache, 0)
        with pytest.raises(ValueError, match="expected an empty cache, got one of 40 tokens"):
            use_gates(cache, sets["chat"])


def test_a_cache_without_gates_is_refused(model, sets):
    with (
        evicting(model, Full(), CacheConfig()) as cache,
        pytest.raises(ValueError, match="expected a cache that gates score"),
    ):
        use_gates(cache, sets["chat"])


def test_gates_of_another_base_objective_or_memory_are_refused(model, sets):
    other = make(model, 1, other_model=tiny_qwen3(seed=4))
    ranked = make(model, 1)
    ranked.training_record = {"objective": "kvzap"}
    remembering = make(model, 1)
    remembering.memory = RetentionMemory(Slots(slots=2), remembering.shape)
    with evicting(model, DBTrimKV(), CONFIG, gates=sets["maths"]) as cache:
        for gates, sentence in ((other, "weight_hash"), (ranked, "objective"), (remembering, "gates with memory None")):
            with pytest.raises(ValueError, match=sentence):
                use_gates(cache.fork(), gates)


def test_memories_of_one_kind_are_switched_with_their_gates(model):
    pair = [make(model, seed) for seed in (1, 2)]
    for gates in pair:
        gates.memory = RetentionMemory(Slots(slots=2), gates.shape)
    config = CacheConfig(budget=Budget(10), on_evict="memory")
    with evicting(model, DBTrimKV(), config, gates=pair[0]) as cache:
        fork = use_gates(cache.fork(), pair[1])
        assert (fork.memory, cache.memory) == (pair[1].memory, pair[0].memory)
        assert turn(model, fork, 0).isfinite().all()
