"""A conversation that was saved and restored goes on as if it had not been; what does not fit is refused."""

import copy
import json
import math
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from retention import POLICIES, Budget, CacheConfig, RetentionGates, evicting
from retention.cache import persist
from retention.gates.trim import Trim
from tests import tiny
from tests.cache.helpers import (
    COLLECTED,
    DECODING,
    EVERY,
    EVICTING,
    LASTING,
    Conversation,
    gates_of,
    left_padded,
    model_of,
    same,
    small,
    tokens,
)
from tests.cache.test_ledger import assert_ledger
from tests.cache.truth import one_of_each

PROMPT = left_padded(tokens(2, 20, seed=1), [20, 13])
QUESTION = left_padded(tokens(2, 7, seed=2), [4, 7])
ANSWERS = tokens(2, 20, seed=3)
COLLECT = COLLECTED
TABLE = "retention_cache"


@contextmanager
def opened(name, config, model=None, **options):
    model = model or model_of()
    with evicting(model, small(name), config, gates=gates_of(), **options) as cache:
        yield cache, Conversation(model, cache)


def go_on(told, start, count):
    """A few tokens, a question, a few more; logits and what is held after each."""
    logits, held = [], []
    for step in range(count):
        logits.append(told.feed(ANSWERS[:, start + step, None]))
        held.append(told.cache.kept_table())
    logits.append(told.feed(*QUESTION))
    for step in range(2):
        logits.append(told.feed(ANSWERS[:, start + count + step, None]))
    return logits, [*held, told.cache.kept_table()]


def assert_goes_on(told, file, start, open_again, count=5):
    """Save, go on, restore into another block's fresh cache, go on there: equal to the bit."""
    cache, mask = told.cache, told.mask
    cache.save(file)
    before = [x.clone() for group in cache.tensors().values() for x in group]
    expected = go_on(told, start, count)
    yield before
    with open_again() as (again, other):
        again.restore(file)
        assert_ledger(again)
        assert again.get_seq_length() == mask.shape[1]
        other.mask = mask
        logits, held = go_on(other, start, count)
    assert all(torch.equal(a, b) for a, b in zip(held, expected[1], strict=True))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(logits, expected[0], strict=True))


@pytest.mark.parametrize("when", ["before", "after", "decoding"])
@pytest.mark.parametrize("positions", ["original", "packed"])
@pytest.mark.parametrize("name", one_of_each(EVERY))
def test_a_restored_conversation_goes_on_as_the_unsaved_one(name, positions, when, tmp_path):
    every = 3 if name in DECODING else None
    config = CacheConfig(Budget(6.0), positions=positions, evict_every=every)
    file, steps = tmp_path / "saved.safetensors", {"before": 0, "after": 0, "decoding": 2}[when]
    with opened(name, config) as (cache, told):
        if when == "before":
            with cache.hold():
                told.feed(*PROMPT)
        else:
            told.feed(*PROMPT)
        for step in range(steps):
            told.feed(ANSWERS[:, step, None])
        assert cache.evicted == (when != "before" and name != "full")
        going = assert_goes_on(told, file, steps, lambda: opened(name, config))
        next(going)
    next(going, None)


@pytest.mark.parametrize("since", [0, 1, 2])
def test_the_next_eviction_comes_at_the_same_token(since, tmp_path):
    config, file = CacheConfig(Budget(6.0), evict_every=3), tmp_path / "saved.safetensors"
    with opened("knorm", config) as (cache, told):
        told.feed(*PROMPT)
        for step in range(since):
            told.feed(ANSWERS[:, step, None])
        cache.save(file)
        mask = told.mask
    with opened("knorm", config) as (cache, told):
        cache.restore(file)
        told.mask = mask
        counts = []
        for step in range(4):
            told.feed(ANSWERS[:, since + step, None])
            counts.append(int(cache.kept()[0, 0, 0]) - 6)
    assert counts == [(since + step + 1) % 3 for step in range(4)]


@pytest.mark.parametrize("name", ["snapkv", "h2o", "db_trim_kv"])
def test_everything_collected_survives_for_later_forks(name, tmp_path):
    config, file = CacheConfig(Budget(6.0)), tmp_path / "saved.safetensors"
    with opened("full", config, extra_collectors=COLLECT, packed=True) as (cache, told):
        told.feed(*PROMPT)
        fork = cache.fork(small(name), config)
        fork.evict()
        cache.save(file)
    with opened("full", config, extra_collectors=COLLECT, packed=True) as (cache, _):
        cache.restore(file)
        for positions in ("original", "packed"):
            again = cache.fork(small(name), CacheConfig(Budget(6.0), positions=positions))
            again.evict()
            assert torch.equal(again.kept_table(), fork.kept_table())


def test_saving_changes_nothing_and_restoring_forgets_what_was_there(tmp_path):
    config, file = CacheConfig(Budget(6.0), allocator="global"), tmp_path / "saved.safetensors"
    with opened("h2o", config) as (cache, told):
        told.feed(*PROMPT)
        told.feed(ANSWERS[:, :1])
        before = [x.clone() for group in cache.tensors().values() for x in group]
        cache.save(file)
        assert all(same(a, b) for a, b in zip(before, (x for g in cache.tensors().values() for x in g), strict=True))
        table, mask = cache.kept_table(), told.mask
        told.feed(tokens(2, 30, seed=9))
        cache.protect(torch.ones(2, 2, dtype=torch.bool))
        cache.restore(file)
        assert cache.tokens.pending is None
        assert torch.equal(cache.kept_table(), table)
        assert cache.bytes().peak == cache.bytes().total
        told.mask = mask
        told.feed(*QUESTION)
        assert cache.kept().sum((0, 2)).tolist() == [36, 36]


def test_a_mask_that_waits_and_protected_tokens_are_saved(tmp_path):
    config, file = CacheConfig(Budget(6.0)), tmp_path / "saved.safetensors"
    wanted = torch.zeros(2, 22, dtype=torch.bool)
    wanted[:, [10, 21]] = True
    with opened("knorm", config) as (cache, told):
        cache.protect(wanted)
        told.feed(*PROMPT)
        cache.save(file)
        mask = told.mask
    with opened("knorm", config) as (cache, told):
        cache.restore(file)
        told.mask = mask
        told.feed(tokens(2, 9, seed=4))
        seen = torch.tensor([20, 13])
        for row in range(2):
            assert cache.kept_table()[:, row, :, int(seen[row]) + 1].all()
            assert cache.kept_table()[:, row, :, 10 - 20 + int(seen[row])].all()


def test_an_empty_conversation_may_be_saved(tmp_path):
    with opened("knorm", CacheConfig(Budget(6.0), positions="packed")) as (cache, told):
        cache.save(tmp_path / "saved")
        cache.restore(tmp_path / "saved")
        told.feed(*PROMPT)
        assert (cache.kept() == 6).all()


def test_half_precision(tmp_path):
    model, config = copy.deepcopy(model_of()).to(torch.bfloat16), CacheConfig(Budget(6.0), positions="packed")
    with opened("h2o", config, model) as (_, told):
        told.feed(*PROMPT)
        going = assert_goes_on(told, tmp_path / "saved", 0, lambda: opened("h2o", config, model))
        next(going)
    next(going, None)


KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
HYBRIDS = {
    "gemma3_text": tiny.tiny_gemma3,
    "qwen3_next": tiny.tiny_qwen3_next,
    "qwen3": lambda: tiny.tiny_qwen3(layer_types=KINDS, sliding_window=8, use_sliding_window=True),
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrid_models(family, tmp_path):
    config, file = CacheConfig(Budget(6.0), positions="packed", evict_every=2), tmp_path / "saved"
    model = HYBRIDS[family]()
    gates = RetentionGates.for_model(Trim(gate_hidden=8), model)

    @contextmanager
    def opened():
        with evicting(model, small("db_trim_kv"), config, gates=gates) as cache:
            yield cache, Conversation(model, cache)

    with opened() as (cache, told):
        told.feed(*PROMPT)
        told.feed(ANSWERS[:, :1])
        kinds = [(getattr(x, "dtype", None), getattr(x, "device", None)) for x in cache.layers]
        going = assert_goes_on(told, file, 1, opened)
        next(going)
    next(going, None)
    with opened() as (cache, _):
        cache.restore(file)
        stock = [i for i in range(len(cache.layers)) if i not in cache.shape.layers]
        assert [(cache.layers[i].dtype, cache.layers[i].device) for i in stock] == [kinds[i] for i in stock]


def test_frequencies_that_changed_often_stay_in_order(tmp_path):
    """Dynamic scaling changes them at every token past the original length: more than ten sets."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model = tiny.tiny_llama(rope_parameters=rope, max_position_embeddings=8)
    config, file, ids = CacheConfig(Budget(6.0), positions="packed"), tmp_path / "saved", tokens(1, 40)
    with evicting(model, small("knorm"), config) as cache, torch.no_grad(), cache.hold():
        model(ids[:, :10], past_key_values=cache)
        for step in range(14):
            model(ids[:, 10 + step, None], past_key_values=cache)
        assert len(cache.rotation.frequencies) > 11
        cache.save(file)
        cache.evict()
        expected = cache.evicting_layers[0].state()
    with evicting(model, small("knorm"), config) as cache:
        cache.restore(file)
        cache.evict()
        assert torch.equal(cache.evicting_layers[0].state().keys, expected.keys)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """An evicted conversation at original positions, had with Knorm."""
    file = tmp_path / "source" / "saved.safetensors"
    with opened("knorm", CacheConfig(Budget(6.0))) as (cache, told):
        told.feed(*PROMPT)
        cache.save(file)
    return file


def refused(file, match, name="knorm", config=None, model=None):
    """One sentence, and the cache goes on with what it held."""
    config, gates = config or CacheConfig(Budget(6.0)), gates_of() if model is None else None
    with evicting(model or model_of(), small(name), config, gates=gates) as cache:
        told = Conversation(model or model_of(), cache)
        told.feed(*PROMPT)
        table = cache.kept_table()
        with pytest.raises(ValueError, match=match) as caught:
            cache.restore(file)
        assert "\n" not in str(caught.value)
        assert torch.equal(cache.kept_table(), table)
        told.feed(ANSWERS[:, :1])


def test_a_missing_file(tmp_path):
    refused(tmp_path / "none", "expected a saved conversation at .*none, found none; check the path")
    refused(tmp_path, "found none")


@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.999])
def test_a_truncated_file(part, saved, tmp_path):
    data = saved.read_bytes()
    file = tmp_path / "cut"
    file.write_bytes(data[: math.floor(part * len(data))])
    refused(file, "is damaged")


def test_another_safetensors_file(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other")
    refused(tmp_path / "other", "got another safetensors file")
    save_file({"weight": torch.zeros(3)}, tmp_path / "other", metadata={TABLE: "no json {"})
    refused(tmp_path / "other", "is damaged")


def changed(saved, file, **changes):
    from safetensors import safe_open

    with safe_open(saved, "pt") as opened:
        state = json.loads(opened.metadata()[TABLE])
    save_file(load_file(saved), file, metadata={TABLE: json.dumps(state | changes)})
    return file


def test_a_newer_format(saved, tmp_path):
    newer = persist.FORMAT_VERSION + 1
    refused(changed(saved, tmp_path / "new", format_version=newer), f"or older in .*, got {newer}; update retention")
    refused(changed(saved, tmp_path / "new", format_version=None), "got None")


def test_another_model_dtype_or_shape(saved):
    match = "another model or dtype"
    refused(saved, match, model=tiny.tiny_llama(seed=1, initializer_range=0.15))
    refused(saved, match, model=tiny.tiny_qwen3())
    refused(saved, match, model=copy.deepcopy(model_of()).bfloat16())


def test_other_positions_after_an_eviction(saved):
    packed = CacheConfig(Budget(6.0), positions="packed")
    refused(saved, "was evicted with positions=original, this cache has positions=packed", config=packed)


def test_a_restored_conversation_remembers_that_it_was_evicted(saved, tmp_path):
    packed = CacheConfig(Budget(6.0), positions="packed")
    with opened("knorm", CacheConfig(Budget(6.0)), packed=True) as (cache, _):
        cache.restore(saved)
        with pytest.raises(ValueError, match="evicted at original positions already"):
            cache.fork(config=packed)
        cache.save(tmp_path / "again")
    refused(tmp_path / "again", "was evicted with positions=original", config=packed)


def test_positions_nobody_noted(tmp_path):
    """Before an eviction positions may change, if they were recorded."""
    ample, packed = CacheConfig(Budget(60.0)), CacheConfig(Budget(6.0), positions="packed")
    with opened("knorm", ample) as (cache, told):
        told.feed(*PROMPT)
        cache.save(tmp_path / "plain")
    refused(tmp_path / "plain", "positions=packed", config=packed)
    with opened("knorm", ample, packed=True) as (cache, told):
        told.feed(*PROMPT)
        cache.save(tmp_path / "noted")
    with opened("knorm", packed) as (cache, told):
        cache.restore(tmp_path / "noted")
        cache.evict()
        keys = cache.evicting_layers[1].state().keys
    with opened("knorm", packed) as (cache, told):
        told.feed(*PROMPT)
        assert torch.equal(cache.evicting_layers[1].state().keys, keys)


def test_another_page_size(saved, monkeypatch):
    """Pages are cut to a size that a later version may change."""
    from retention.cache import storage

    with opened("knorm", CacheConfig(Budget(7.0), allocator="global")) as (cache, told):
        told.feed(*PROMPT)
        assert cache.evicting_layers[0].store.page_counts is not None
        cache.save(saved.parent / "small pages")
    monkeypatch.setattr(storage, "PAGE", 4)
    refused(saved.parent / "small pages", "page", config=CacheConfig(Budget(7.0), allocator="global"))


NEEDY = [n for n in EVICTING if LASTING & {*POLICIES[n]().collectors}]


@pytest.mark.parametrize("name", NEEDY)
def test_a_policy_whose_statistics_are_missing(name, saved):
    refused(saved, r"reads '\w+', which the conversation in .* \(had with Knorm\) did not collect", name)


@pytest.mark.parametrize("name", [n for n in EVICTING if n not in NEEDY])
def test_any_other_policy_may_go_on(name, saved):
    with opened(name, CacheConfig(Budget(4.0))) as (cache, told):
        cache.restore(saved)
        told.mask = PROMPT[1]
        told.feed(*QUESTION)
        assert cache.kept().sum((0, 2)).tolist() == [24, 24]


def test_written_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    import os

    file = tmp_path / "here" / "saved"
    file.parent.mkdir()
    file.write_bytes(saved.read_bytes())
    with opened("knorm", CacheConfig(Budget(6.0))) as (cache, told):
        told.feed(*PROMPT)
        told.feed(ANSWERS[:, :1])

        def broken(*args):
            raise OSError("disk full")

        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "fsync"):
                patch.setattr(os, name, broken)
            with pytest.raises(OSError, match="disk full"):
                cache.save(file)
        assert file.read_bytes() == saved.read_bytes()
        cache.save(file)
        assert file.read_bytes() != saved.read_bytes()
    assert [x.name for x in file.parent.iterdir()] == ["saved"]
