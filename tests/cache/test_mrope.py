"""Models with three-axis positions: stock within the budget, hidden entries, packed keys, whose offset it is."""

import pytest
import torch
from transformers import DynamicCache

from retention import Budget, CacheConfig, evicting
from tests import tiny
from tests.cache.helpers import gap, small, tokens
from tests.cache.truth import Hiding, written

BUILDERS = {"qwen2_5_vl": tiny.tiny_qwen2_5_vl, "qwen3_vl": tiny.tiny_qwen3_vl}
PARTS = (3, (2, 4), 5, (3, 2), 4)
LENGTH = 3 + 8 + 5 + 6 + 4
FIRST = tiny.grid_inputs(*PARTS)
OTHER = tiny.grid_inputs(2, (4, 3), 6, seed=5)
QUESTION, ANSWERS = tokens(1, 6, seed=2).clamp(max=95), tokens(1, 12, seed=3).clamp(max=95)
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
AMPLE = CacheConfig(Budget(100.0))
_MODELS = {}


def built(family):
    """A shared model without an offset from an earlier test."""
    if family not in _MODELS:
        _MODELS[family] = BUILDERS[family]()
    _MODELS[family].model.rope_deltas = None
    return _MODELS[family]


@torch.no_grad()
def talk(model, cache, prompt, question=QUESTION, answers=3):
    """Logits of a prompt, some tokens, a question, some more tokens, positions left to the model."""
    parts = [prompt, *({"input_ids": ANSWERS[:, i, None]} for i in range(answers)), {"input_ids": question}]
    parts += [{"input_ids": ANSWERS[:, answers + i, None]} for i in range(answers)]
    for part in parts:
        yield model(**part, past_key_values=cache, use_cache=True).logits


def stock(family, prompt, **options):
    model = built(family)
    return list(talk(model, DynamicCache(config=model.config.get_text_config()), prompt, **options))


def conversation(model, cache, prompt):
    """Two turns through generate(): all logits, all ids."""
    first = model.generate(**prompt, past_key_values=cache, **OPTIONS)
    ids = torch.cat([first.sequences, QUESTION], 1)
    kinds = torch.zeros_like(ids)
    kinds[:, : prompt["input_ids"].shape[1]] = prompt["mm_token_type_ids"]
    second = model.generate(input_ids=ids, mm_token_type_ids=kinds, past_key_values=cache, **OPTIONS)
    return [*first.logits, *second.logits], second.sequences


@pytest.mark.parametrize("positions", ["original", "packed"])
@pytest.mark.parametrize("family", BUILDERS)
def test_within_the_budget_forwards_and_generation_are_stock(family, positions):
    expected = stock(family, FIRST)
    config = CacheConfig(Budget(100.0), positions=positions)
    model = built(family)
    with evicting(model, small("knorm"), config) as cache:
        got = list(talk(model, cache, FIRST))
    assert max(gap(a, b) for a, b in zip(got, expected, strict=True)) < 1e-5
    truth = conversation(built(family), DynamicCache(config=model.config.get_text_config()), FIRST)
    model = built(family)
    with evicting(model, small("knorm"), config) as cache:
        out = conversation(model, cache, FIRST)
        assert not cache.evicted
    assert torch.equal(out[1], truth[1])
    assert max(gap(a[:, None], b[:, None]) for a, b in zip(out[0], truth[0], strict=True)) < 1e-5


@pytest.mark.parametrize("name", ["knorm", "h2o", "snapkv", "streaming_llm"])
@pytest.mark.parametrize("family", BUILDERS)
def test_evictions_equal_the_hidden_full_cache(family, name):
    oracle, model = Hiding(built(family)), built(family)
    config = CacheConfig(Budget(8.0), evict_every=None if name == "snapkv" else 2)
    with evicting(model, small(name), config) as cache, torch.no_grad():
        for part in (FIRST, *({"input_ids": ANSWERS[:, i, None]} for i in range(3)), {"input_ids": QUESTION}, {"input_ids": ANSWERS[:, 3:4]}):  # fmt: skip
            got = model(**part, past_key_values=cache).logits
            assert gap(got, oracle.feed(**part)) < 1e-4
            oracle.drop(cache)
        assert cache.evicted


@pytest.mark.parametrize("allocator", ["uniform", "global"])
@pytest.mark.parametrize("family", BUILDERS)
def test_packed_keys_are_those_the_model_would_write_there(family, allocator):
    model = built(family)
    config = CacheConfig(Budget(9.0), positions="packed", allocator=allocator, evict_every=4)
    with evicting(model, small("random"), config) as cache, written(model) as keys, torch.no_grad():
        model(**FIRST, past_key_values=cache)
        assert keys.check_packed(cache) < 1e-5
        for step in range(4):
            model(input_ids=ANSWERS[:, step, None], past_key_values=cache)
        assert keys.check_packed(cache) < 1e-5, "evicted while decoding"
        model(input_ids=QUESTION, past_key_values=cache)
        assert keys.check_packed(cache) < 1e-5, "after a second turn"


@pytest.mark.parametrize(("budget", "chunk"), [(7.0, 8), (2.0, 8), (2.0, 5)])
def test_packed_keys_after_chunks_that_cut_an_image(budget, chunk):
    """The rest of a cut image lies at its start, so what is kept must not move up to where its first rows ended."""
    model = built("qwen2_5_vl")
    config = CacheConfig(Budget(budget), positions="packed", prefill_chunk=chunk)
    with evicting(model, small("random"), config) as cache, written(model) as keys, torch.no_grad():
        model(**FIRST, past_key_values=cache)
        assert keys.check_packed(cache) < 1e-5
        model(input_ids=QUESTION, past_key_values=cache)
        assert keys.check_packed(cache) < 1e-5


@pytest.mark.parametrize("family", BUILDERS)
def test_chunks_within_the_budget_are_stock(family):
    """Also where features of an image are added behind the first layers: each chunk gets its own."""
    expected, model = stock(family, FIRST), built(family)
    for options in ({"prefill_chunk": 5}, {"chunk_by_image": True}):
        config = CacheConfig(Budget(100.0), positions="packed", **options)
        with evicting(model, small("knorm"), config) as cache:
            got = list(talk(model, cache, FIRST))
        assert max(gap(a, b) for a, b in zip(got, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("family", BUILDERS)
def test_visual_entries_are_marked(family):
    model = built(family)
    with evicting(model, small("knorm"), AMPLE) as cache, torch.no_grad():
        model(**FIRST, past_key_values=cache)
        marked = cache.evicting_layers[0].state().visual[0, 0]
    assert torch.equal(marked, FIRST["input_ids"][0] == tiny.IMAGE_TOKEN)


# --- whose offset it is -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BUILDERS)
def test_conversations_may_take_turns_on_one_model(family):
    prompts = [FIRST, OTHER, FIRST]
    expected = [stock(family, prompt) for prompt in prompts]
    model = built(family)
    with evicting(model, small("knorm"), AMPLE) as first:
        caches = [first, first.fork(), first.fork()]
        talks = [talk(model, cache, prompt) for cache, prompt in zip(caches, prompts, strict=True)]
        for turn in zip(*talks, *expected, strict=True):
            for got, truth in zip(turn[:3], turn[3:], strict=True):
                assert gap(got, truth) < 1e-5


@pytest.mark.parametrize("through", ["forward", "generate"])
@pytest.mark.parametrize("family", BUILDERS)
def test_a_text_after_a_conversation_with_images_has_no_offset(family, through):
    text = {"input_ids": tokens(1, 9, seed=4).clamp(max=95)}
    with_kinds = text | {"mm_token_type_ids": torch.zeros_like(text["input_ids"])}
    if through == "forward":
        expected = stock(family, text)
    else:
        model = built(family)
        expected = conversation(model, DynamicCache(config=model.config.get_text_config()), with_kinds)[0]
    model = built(family)
    with evicting(model, small("knorm"), AMPLE) as first, torch.no_grad():
        model(**FIRST, past_key_values=first)
        held = first.rope_deltas.clone()
        assert held.any()
        second = first.fork()
        second.reset()
        run = talk(model, second, text) if through == "forward" else conversation(model, second, with_kinds)[0]
        got = list(run)
        assert torch.equal(first.rope_deltas, held)
    assert max(gap(a, b) for a, b in zip(got, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("family", BUILDERS)
def test_conversations_may_take_turns_through_generate(family):
    turns = [(FIRST, 0), (OTHER, 1)]
    truth = [conversation(built(family), DynamicCache(config=built(family).config.get_text_config()), p) for p, _ in turns]  # fmt: skip
    model = built(family)
    with evicting(model, small("knorm"), AMPLE) as first:
        caches, sequences = [first, first.fork()], []
        for prompt, i in turns:
            sequences.append(model.generate(**prompt, past_key_values=caches[i], **OPTIONS).sequences)
        for prompt, i in turns:
            ids = torch.cat([sequences[i], QUESTION], 1)
            kinds = torch.zeros_like(ids)
            kinds[:, : prompt["input_ids"].shape[1]] = prompt["mm_token_type_ids"]
            out = model.generate(input_ids=ids, mm_token_type_ids=kinds, past_key_values=caches[i], **OPTIONS)
            assert torch.equal(out.sequences, truth[i][1])
            assert max(gap(a, b) for a, b in zip(out.logits, truth[i][0][5:], strict=True)) < 1e-5


@pytest.mark.parametrize("family", BUILDERS)
def test_leaving_gives_the_models_own_offset_back(family):
    model = built(family)
    model.model.rope_deltas = mine = torch.tensor([[99]])
    with evicting(model, small("knorm"), AMPLE) as cache, torch.no_grad():
        model(**FIRST, past_key_values=cache)
        assert not torch.equal(model.model.rope_deltas, mine)
    assert model.model.rope_deltas is mine
    assert "_prepare_position_ids_for_generation" not in vars(model)


@pytest.mark.parametrize("positions", ["original", "packed"])
@pytest.mark.parametrize("family", BUILDERS)
def test_a_second_turn_in_another_process(family, positions, tmp_path):
    """A fresh model object knows no offset; the saved conversation brings its own."""
    config, model = CacheConfig(Budget(8.0), positions=positions), built(family)
    rest = [{"input_ids": QUESTION}, {"input_ids": ANSWERS[:, :1]}]
    with evicting(model, small("knorm"), config) as cache, torch.no_grad():
        model(**FIRST, past_key_values=cache)
        cache.save(tmp_path / "saved")
        expected = [model(**part, past_key_values=cache).logits for part in rest]
        table = cache.kept_table()
    fresh = BUILDERS[family]()
    with evicting(fresh, small("knorm"), config) as cache, torch.no_grad():
        cache.restore(tmp_path / "saved")
        got = [fresh(**part, past_key_values=cache).logits for part in rest]
        assert torch.equal(cache.kept_table(), table)
    assert max(gap(a, b) for a, b in zip(got, expected, strict=True)) < 1e-6


@pytest.mark.parametrize("family", BUILDERS)
def test_rows_bring_their_offsets(family):
    model, rows = built(family), torch.tensor([1, 0, 1])
    pair = {name: torch.cat([FIRST[name]] * 2) for name in FIRST}
    pair["input_ids"] = pair["input_ids"].clone()
    with evicting(model, small("knorm"), CacheConfig(Budget(8.0), positions="packed")) as cache, torch.no_grad():
        model(**pair, past_key_values=cache)
        twin = cache.fork()
        twin.batch_select_indices(rows)
        twin.rope_deltas = twin.rope_deltas.clone()
        assert len(twin.rope_deltas) == 3
        step = torch.cat([QUESTION, QUESTION.flip(1)])
        expected = model(input_ids=step, past_key_values=cache).logits[rows]
        assert gap(model(input_ids=step[rows], past_key_values=twin).logits, expected) < 1e-5


@pytest.mark.parametrize("family", BUILDERS)
def test_text_alone_may_be_packed(family):
    """Without images the model itself leaves positions open; they are the sequence's."""
    model = built(family)
    config = CacheConfig(Budget(6.0), positions="packed")
    with evicting(model, small("random"), config) as cache, written(model) as keys, torch.no_grad():
        for ids in (ANSWERS, QUESTION):
            model(input_ids=ids, past_key_values=cache)
            assert keys.check_packed(cache) < 1e-5
