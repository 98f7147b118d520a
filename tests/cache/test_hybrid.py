"""Models with sliding or linear layers beside full attention: those stay transformers' own, whatever is evicted."""

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache

from retention import Budget, CacheConfig, RetentionGates, evicting
from retention.cache.ledger import physical_bytes
from retention.gates.trim import Trim
from tests import tiny
from tests.cache.helpers import DECODING, EVICTING, gap, left_padded, same, small, tokens
from tests.cache.truth import Hiding, one_of_each, written

KINDS = ["sliding_attention", "full_attention", "full_attention"]
SLIDING = {"layer_types": KINDS, "sliding_window": 8, "use_sliding_window": True}
BUILDERS = {
    "gemma3_text": tiny.tiny_gemma3,
    "qwen3": lambda: tiny.tiny_qwen3(**SLIDING),
    "qwen3_next": tiny.tiny_qwen3_next,
}
LENGTHS = [24, 17]
PROMPT = left_padded(tokens(2, 24, seed=1), LENGTHS)
QUESTION = left_padded(tokens(2, 6, seed=2), [6, 4])
ANSWERS = tokens(2, 12, seed=3)
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
KINDS_OF_POLICY = one_of_each(EVICTING)
_MODELS, _GATES = {}, {}


def built(family):
    if family not in _MODELS:
        _MODELS[family] = BUILDERS[family]()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            _GATES[family] = RetentionGates.for_model(Trim(gate_hidden=8, init_half_life=10.0), _MODELS[family])
            for name, parameter in _GATES[family].named_parameters():
                if "offset" not in name:
                    torch.nn.init.normal_(parameter, std=0.5)
    return _MODELS[family]


@contextmanager
def opened(family, name, config, **options):
    model = built(family)
    with evicting(model, small(name), config, gates=_GATES[family], **options) as cache, torch.no_grad():
        yield model, cache


def turns(model, cache, *parts, oracle=None, after=None):
    """Feed (ids, mask) one after the other to a cache and an oracle; the largest difference at real tokens."""
    mask, worst, outputs = None, 0.0, []
    for ids, new in parts:
        mask = new if mask is None else torch.cat([mask, new], 1)
        places = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        outputs.append(model(**inputs, past_key_values=cache, use_cache=True).logits)
        if oracle is not None:
            worst = max(worst, gap(outputs[-1], oracle.feed(**inputs), new))
            oracle.drop(cache)
    return outputs, worst


def steps(count, start=0, rows=slice(None)):
    ones = torch.ones(len(ANSWERS[rows]), 1, dtype=torch.long)
    return [(ANSWERS[rows, start + i, None], ones) for i in range(count)]


def outside(cache):
    return [x for layer in cache.layers if layer not in cache.evicting_layers for x in tensors_in(layer)]


def tensors_in(layer):
    values = [v for value in vars(layer).values() for v in (value.values() if isinstance(value, dict) else [value])]
    return [v for v in values if torch.is_tensor(v)]


@pytest.mark.parametrize("lengths", [[24, 24], LENGTHS])
@pytest.mark.parametrize("family", BUILDERS)
def test_within_the_budget_generation_is_stock(family, lengths):
    ids, mask = left_padded(tokens(2, 24, seed=1), lengths)
    stock = DynamicCache(config=built(family).config)
    expected = built(family).generate(ids, attention_mask=mask, past_key_values=stock, **OPTIONS)
    with opened(family, "knorm", CacheConfig(Budget(64.0))) as (model, cache):
        assert 0 < len(cache.evicting_layers) < len(cache.layers)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **OPTIONS)
        assert cache.get_seq_length() == stock.get_seq_length() == 29
    assert torch.equal(out.sequences, expected.sequences)
    assert max(gap(a, b) for a, b in zip(out.logits, expected.logits, strict=True)) < 1e-5


@pytest.mark.parametrize("name", KINDS_OF_POLICY)
@pytest.mark.parametrize("family", BUILDERS)
def test_evictions_of_a_padded_batch_equal_the_hidden_full_cache(family, name):
    oracle = Hiding(built(family))
    config = CacheConfig(Budget(6.0), evict_every=2 if name in DECODING else None, on_evict="drop")
    with opened(family, name, config) as (model, cache):
        parts = [PROMPT, *steps(3), QUESTION, *steps(4, 3)]
        assert turns(model, cache, *parts, oracle=oracle)[1] < 1e-4
        assert cache.evicted


@pytest.mark.parametrize("family", BUILDERS)
def test_chunks_of_a_padded_prompt_equal_the_hidden_full_cache(family):
    """Each chunk as a turn of its own evicts as chunked prefill does."""
    cuts, (ids, mask) = [0, 7, 14, 21, 24], PROMPT
    parts = [(ids[:, a:b], mask[:, a:b]) for a, b in pairwise(cuts)]
    oracle = Hiding(built(family))
    with opened(family, "knorm", CacheConfig(Budget(6.0))) as (model, cache):
        apart, worst = turns(model, cache, *parts, oracle=oracle)
        assert worst < 1e-4
        table = cache.kept_table()
    with opened(family, "knorm", CacheConfig(Budget(6.0), prefill_chunk=7)) as (model, cache):
        (together,), _ = turns(model, cache, PROMPT)
        assert torch.equal(cache.kept_table(), table)
        assert gap(together, torch.cat(apart, 1), mask) < 1e-4


@pytest.mark.parametrize("family", BUILDERS)
def test_the_hiding_oracle_without_drops_is_stock_and_sees_one_wrong_entry(family):
    model, results = built(family), []
    inputs = {"input_ids": ANSWERS[:, :10]}
    for change in (False, True):
        oracle = Hiding(model)
        first = oracle.feed(**inputs)
        assert gap(first, model(**inputs).logits) < 1e-5
        oracle.held = torch.ones(len(oracle.layers), 2, 2, 10, dtype=torch.bool)
        oracle.held[0, 0, 1, 4] = not change
        results.append(oracle.feed(input_ids=ANSWERS[:, 10:11]))
    assert gap(*results) > 1e-4


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next"])
def test_packed_keys_are_rotated_by_full_attentions_own_frequencies(family):
    config = CacheConfig(Budget(5.0), positions="packed", allocator="global", prefill_chunk=9)
    with opened(family, "knorm", config) as (model, cache), written(model) as keys:
        for ids in (tokens(2, 20, seed=1), tokens(2, 7, seed=2)):
            model(ids, past_key_values=cache)
            assert keys.check_packed(cache) < 1e-5


@pytest.mark.parametrize("family", BUILDERS)
def test_forks_share_no_state_in_place(family):
    with opened(family, "knorm", CacheConfig(Budget(6.0))) as (model, cache):
        (first,), _ = turns(model, cache, PROMPT)
        before, mask = [x.clone() for x in outside(cache)], PROMPT[1]
        twins = [cache.fork(), cache.fork()]
        results = []
        for twin in (*twins, cache):
            told, logits = mask, []
            for ids, new in (*steps(3), QUESTION):
                told = torch.cat([told, new], 1)
                places = (told.cumsum(1) - 1)[:, -ids.shape[1] :]
                out = model(ids, attention_mask=told, position_ids=places, past_key_values=twin)
                logits.append(out.logits)
            results.append(torch.cat(logits, 1))
            if twin is not cache:
                assert all(same(a, b) for a, b in zip(outside(cache), before, strict=True))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        assert torch.isfinite(first[mask.bool()]).all()


@pytest.mark.parametrize("family", BUILDERS)
def test_reset_starts_anew(family):
    with opened(family, "h2o", CacheConfig(Budget(6.0), evict_every=3)) as (model, cache):
        first, _ = turns(model, cache, PROMPT, *steps(4))
        table = cache.kept_table()
        cache.reset()
        assert cache.get_seq_length() == 0
        again, _ = turns(model, cache, PROMPT, *steps(4))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert torch.equal(cache.kept_table(), table)


@pytest.mark.parametrize("family", BUILDERS)
def test_rows_of_stock_layers_follow(family):
    rows = torch.tensor([1, 0, 1])
    with opened(family, "knorm", CacheConfig(Budget(6.0))) as (model, cache):
        turns(model, cache, PROMPT)
        twin = cache.fork()
        twin.batch_select_indices(rows)
        mask = torch.cat([PROMPT[1], torch.ones(2, 1, dtype=torch.long)], 1)
        places = (mask.cumsum(1) - 1)[:, -1:]
        step = ANSWERS[:, :1]
        expected = model(step, attention_mask=mask, position_ids=places, past_key_values=cache).logits[rows]
        got = model(step[rows], attention_mask=mask[rows], position_ids=places[rows], past_key_values=twin).logits
        assert gap(got, expected) < 1e-4


@pytest.mark.parametrize("family", BUILDERS)
def test_the_ledger_names_what_is_outside(family):
    with opened(family, "knorm", CacheConfig(Budget(6.0))) as (model, cache):
        turns(model, cache, PROMPT)
        ledger = cache.bytes()
        found = outside(cache)
        assert found
        expected = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}
        assert ledger.physical["outside"] == sum(expected.values())
        stock = DynamicCache(config=model.config)
        model(PROMPT[0], attention_mask=PROMPT[1], past_key_values=stock)
        kept = [x for i, layer in enumerate(stock.layers) if i not in cache.shape.layers for x in tensors_in(layer)]
        assert physical_bytes({"outside": kept})["outside"] == ledger.physical["outside"]


def test_a_model_without_full_attention_is_refused_in_one_sentence():
    """Mistral up to version 0.1: every layer slides, so there is nothing to evict."""
    model = tiny.tiny_mistral(sliding_window=8)
    with pytest.raises(ValueError, match="full-attention"), evicting(model, small("knorm")) as cache:
        model(tokens(1, 12), past_key_values=cache)
