"""Merging what leaves into what stays: the formulas, the cache that holds the result, and forks of it."""

import pytest
import torch

from retention import Budget, CacheConfig, evicting
from retention.cache import evicted
from retention.cache.evicted import MERGES, merged, naive_merged
from tests.cache.helpers import (
    KV_HEADS,
    LAYERS,
    Conversation,
    Oracle,
    gap,
    gates_of,
    left_padded,
    model_of,
    policy_with,
    same,
    small,
    tokens,
)

PROMPT = left_padded(tokens(2, 20, seed=1), [20, 13])
ANSWERS = tokens(2, 8, seed=3)


def drawn(keys=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    entries = torch.randn(2, 3, keys, 4, generator=g), torch.randn(2, 3, keys, 6, generator=g)
    kept = torch.rand(2, 3, keys, generator=g) < 0.4
    valid = torch.rand(2, 3, keys, generator=g) < 0.9
    return *entries, kept & valid, valid & ~kept


@pytest.mark.parametrize("block", [1, 4, 512])
@pytest.mark.parametrize("how", MERGES)
def test_blocks_equal_the_formula(monkeypatch, how, block):
    monkeypatch.setattr(evicted, "BLOCK", block)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        places = [None, torch.rand(2, 3, 30, generator=g).argsort(-1)[..., :9].sort(-1).values]
        for positions in places:
            pairs = (f(*drawn(seed=seed), how, positions) for f in (merged, naive_merged))
            for got, expected in zip(*pairs, strict=True):
                torch.testing.assert_close(got, expected)


def test_nearest_by_hand():
    """Positions and not slots decide, the earlier of two that are as near."""
    values = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])[None, None, :, None]
    kept = torch.tensor([False, True, False, False, True])[None, None]
    positions = torch.tensor([0, 2, 4, 5, 6])[None, None]
    _, got = merged(values, values, kept, ~kept, "nearest", positions)
    assert got.flatten().tolist() == [pytest.approx(111 / 3), 5500.0]
    _, got = merged(values, values, kept, ~kept, "nearest")
    assert got.flatten().tolist() == [pytest.approx(111 / 3), 5500.0]
    _, got = merged(values, values, kept, ~kept, "nearest", torch.tensor([0, 2, 9, 9, 10])[None, None])
    assert got.flatten().tolist() == [pytest.approx(5.5), pytest.approx(11100 / 3)]


def test_by_hand():
    """Of two kept entries, the first is joined by two evicted ones with cosines 1 and 0.6; the second by none."""
    keys = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, -1.0], [3.0, 4.0]])[None, None]
    values = torch.tensor([[1.0], [3.0], [100.0], [7.0]])[None, None]
    kept = torch.tensor([True, False, True, False])[None, None]
    wanted = {"pivot": (1 + 2 + 4) / 3, "average": (1 + 3 + 7) / 3, "weighted": (1 + 3 + 0.6 * 7) / 3}
    for how, value in wanted.items():
        got_keys, got_values = merged(keys, values, kept, ~kept, how)
        assert got_values.flatten().tolist() == pytest.approx([value, 100.0])
        assert torch.equal(got_keys[1], keys[0, 0, 2]), "what nothing joins stays bit for bit"


@pytest.mark.parametrize("how", MERGES)
def test_heads_that_keep_all_or_nothing(how):
    keys, values, kept, leaving = drawn()
    kept[0, 0], leaving[0, 0] = False, True
    kept[0, 1], leaving[0, 1] = True, False
    got = merged(keys, values, kept, leaving, how)
    assert torch.isfinite(got[0]).all()
    assert torch.equal(got[0][:9], keys[0, 1])
    nothing = torch.zeros_like(kept)
    assert [len(x) for x in merged(keys, values, nothing, ~nothing, how)] == [0, 0]


def test_half_precision_is_averaged_in_fp32():
    keys, values, kept, leaving = drawn()
    got = merged(keys.bfloat16(), values.bfloat16(), kept, leaving, "average")
    expected = merged(keys.bfloat16().float(), values.bfloat16().float(), kept, leaving, "average")
    assert got[0].dtype == torch.bfloat16
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("page", [2, 32], indirect=True)
@pytest.mark.parametrize("allocator", ["uniform", "global"])
@pytest.mark.parametrize("how", MERGES)
def test_the_cache_holds_what_was_merged(how, allocator):
    """Counts and kept entries are those of dropping; keys and values are the formula's, over two evictions."""
    config = {how: CacheConfig(Budget(6.0), allocator=allocator, on_evict="merge", merge=how)}
    config["drop"] = CacheConfig(Budget(6.0), allocator=allocator)
    tables = []
    for name in config:
        with evicting(
            model_of(), small("streaming_llm" if allocator == "uniform" else "random"), config[name]
        ) as cache:
            told, before = Conversation(model_of(), cache), []
            for part in (PROMPT, (tokens(2, 5, seed=4), None)):
                with cache.hold():
                    told.feed(*part)
                before = [layer.state() for layer in cache.evicting_layers]
                held = [(state.keys.clone(), state.values.clone()) for state in before]
                cache.evict()
                table = cache.kept_table()
                for number, layer in enumerate(cache.evicting_layers):
                    old, new = before[number], layer.state()
                    stays = table[number].gather(-1, old.positions.clamp(min=0)) & old.valid
                    expected = held[number][0][stays], held[number][1][stays]
                    if name != "drop":
                        expected = naive_merged(*held[number], stays, old.valid & ~stays, how, old.positions)
                    for got, wanted in zip((new.keys, new.values), expected, strict=True):
                        torch.testing.assert_close(got[new.valid], wanted)
            tables.append(table)
    assert tables[0].sum() == tables[1].sum() == 2 * 6 * LAYERS * KV_HEADS


def test_merging_changes_answers_and_dropping_is_the_default():
    logits = {}
    for how in (None, "drop", "merge"):
        with evicting(model_of(), small("knorm"), CacheConfig(Budget(6.0), on_evict=how)) as cache:
            told = Conversation(model_of(), cache)
            told.feed(*PROMPT)
            logits[how] = told.feed(ANSWERS[:, :1])
    assert torch.equal(logits[None], logits["drop"])
    assert gap(logits["merge"], logits["drop"]) > 1e-4


def test_look_m_merges_unless_told_to_drop():
    found = {}
    for how in (None, "merge", "drop"):
        with evicting(model_of(), small("look_m"), CacheConfig(Budget(6.0), on_evict=how)) as cache:
            Conversation(model_of(), cache).feed(*PROMPT)
            found[how] = cache.evicting_layers[0].state().keys
    assert torch.equal(found[None], found["merge"])
    assert not torch.equal(found[None], found["drop"])


@pytest.mark.parametrize("positions", ["original", "packed"])
def test_a_fork_that_merges_leaves_its_source_alone(positions):
    config = CacheConfig(Budget(6.0), on_evict="merge", positions=positions)
    with evicting(model_of(), small("full"), packed=True) as source:
        told = Conversation(model_of(), source)
        told.feed(*PROMPT)
        before = [x.clone() for group in source.tensors().values() for x in group]
        results = []
        for twin in (source.fork(small("knorm"), config), source.fork(small("knorm"), config)):
            twin.evict()
            fork = Conversation(model_of(), twin)
            fork.mask = told.mask
            results.append(fork.feed(ANSWERS[:, :1]))
        after = [x for group in source.tensors().values() for x in group]
        assert all(same(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(*results)


def test_packed_entries_are_merged_and_then_turned():
    """Merging acts on keys as they are cached; with nothing to merge into others, packing is as before."""
    everything = policy_with(lambda kv: kv.positions.float())
    oracle, config = Oracle(), CacheConfig(Budget(40.0), on_evict="merge", positions="packed")
    with evicting(model_of(), everything, config) as cache:
        told = Conversation(model_of(), cache)
        assert gap(told.feed(*PROMPT), oracle.feed(*PROMPT), PROMPT[1]) < 1e-5
        assert gap(told.feed(ANSWERS[:, :1]), oracle.feed(ANSWERS[:, :1])) < 1e-5


@pytest.mark.parametrize("every", [1, 3])
def test_merging_while_decoding(every):
    config = CacheConfig(Budget(6.0), on_evict="merge", evict_every=every)
    with evicting(model_of(), small("trim_kv"), config, gates=gates_of()) as cache:
        told = Conversation(model_of(), cache)
        told.feed(*PROMPT)
        for step in range(6):
            assert torch.isfinite(told.feed(ANSWERS[:, step, None])).all()
        assert (cache.kept() == 6 + 6 % every).all()


@pytest.mark.parametrize("values", [{"on_evict": "keep"}, {"merge": "closest"}])
def test_unknown_ways_are_refused(values):
    with pytest.raises(ValueError, match=f"cache.{next(iter(values))} among"):
        CacheConfig(**values)
