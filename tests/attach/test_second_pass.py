"""Second passes against one plain forward over the prompt and all that is fed behind it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from retention import Budget, CacheConfig, evicting
from retention.attach.capture import capture_attention
from retention.cache.inputs import Answers, states
from retention.models.family import decoder_of
from retention.policies.kvzip import KVzip
from retention.policies.oracle import AttentionOracle, Oracle
from tests.attach.helpers import hooks, snapshot
from tests.cache.helpers import KV_HEADS, LAYERS, Conversation, gap, left_padded, model_of, same, small, tokens
from tests.tiny import (
    IMAGE_SIZE,
    IMAGE_TOKEN,
    IMAGE_TOKENS,
    grid_inputs,
    tiny_gemma3,
    tiny_llama,
    tiny_qwen2_5_vl,
    tiny_qwen3_next,
    tiny_qwen3_vl,
)

CHUNK, OVERLAP, SINKS = 9, 3, 2
SETTINGS = {"chunk_size": CHUNK, "overlap": OVERLAP, "sinks": SINKS}
TIGHT = CacheConfig(Budget(6.0))
PROMPT = left_padded(tokens(2, 24, seed=1), [24, 17])
QUESTION = left_padded(tokens(2, 6, seed=2), [6, 4])
PADDED = (PROMPT, QUESTION)


class Words:
    """A tokenizer that knows numbers."""

    unk_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [int(word) if word.isdigit() else 0 for word in text.split()]}


def scores(cache: Any) -> list[Tensor]:
    """What every layer's entries got, before anything leaves."""
    name = cache.policy.second_pass().statistic
    return [kv.statistics[name] for kv in states(cache)]


def plain(model: Any, ids: Tensor, **inputs: Any) -> list[Any]:
    """Queries, keys and values of one forward without a cache."""
    with capture_attention(model) as capture, torch.no_grad():
        model(input_ids=ids, use_cache=False, **inputs)
        return list(capture.layers)


def truth(calls: list[Any], context: int, among: list[int], rows: list[int], weigh: Any = None) -> Tensor:
    """Largest attention of `rows`, softmax over the entries `among` and what was fed up to the row, one by one."""
    found = torch.zeros(len(calls), calls[0].key.shape[1], context)
    for number, call in enumerate(calls):
        groups = call.query.shape[1] // call.key.shape[1]
        for head in range(call.query.shape[1]):
            for row in rows:
                keys = [*among, *range(context, row + 1)]
                logits = call.scaling * call.key[0, head // groups, keys] @ call.query[0, head, row]
                weights = logits.softmax(0)[: len(among)]
                if weigh is not None:
                    weights = weights * weigh(number, head, row, among)
                place = found[number, head // groups]
                place[among] = torch.maximum(place[among], weights)
    return found


def repeated_truth(model: Any, ids: Tensor, words: tuple[list[int], list[int]] = ([], []), **options: Any) -> Tensor:
    """The scores of a text prompt of one row."""
    length, found = ids.shape[1], None
    for start in range(0, length, CHUNK):
        chunk = range(start, min(start + CHUNK, length))
        lead = words[start > 0] + ids[0, max(start - OVERLAP, 0) : start].tolist()
        fed = torch.cat([ids, torch.tensor([lead], dtype=torch.long), ids[:, chunk]], 1)
        calls = plain(model, fed)
        among = sorted({*range(SINKS), *chunk})
        weigh = options.get("weigh")
        own = truth(calls, length, among, list(range(length, fed.shape[1])), weigh and weigh(calls, fed))
        found = own if found is None else torch.maximum(found, own)
    assert found is not None
    return found


@pytest.mark.parametrize("words", [([], []), ([5, 6, 7], [8, 9])])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_chunk_is_measured_against_its_own_entries(family, words):
    model, (ids, _) = model_of(family), PROMPT
    ids, text = ids[:1], [" ".join(map(str, x)) for x in words]
    policy = KVzip(**SETTINGS, instruction=text[0], continuation=text[1])
    with evicting(model, policy, TIGHT, tokenizer=Words()) as cache, cache.hold():
        Conversation(model, cache).feed(ids)
        found = torch.stack(scores(cache))[:, 0]
    expected = repeated_truth(model, ids, words)
    assert torch.allclose(found, expected, atol=1e-5)
    assert (found.std(-1) > 1e-3).all()
    score = KVzip(**SETTINGS).score
    with evicting(model, policy, TIGHT) as cache, cache.hold():
        Conversation(model, cache).feed(ids)
        for kv in states(cache):
            assert (score(kv)[..., :SINKS] == 1).all()
            assert torch.equal(score(kv)[..., SINKS:], kv.statistics["second_pass"][..., SINKS:])


def test_words_that_the_tokenizer_does_not_know_are_left_out():
    model, found = model_of(), []
    for options in ({"instruction": "write it out"}, {"instruction": "", "continuation": ""}, {"instruction": "5"}):
        with evicting(model, KVzip(**SETTINGS, **options), TIGHT, tokenizer=Words()) as cache, cache.hold():
            Conversation(model, cache).feed(*PROMPT)
            found.append(torch.stack(scores(cache)))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-4)


def test_kvzip_plus_weighs_by_the_share_of_the_residual_stream():
    model, ids = model_of(), PROMPT[0][:1]

    def weigh(calls: list[Any], fed: Tensor) -> Any:
        hidden: list[Tensor] = []
        modules = [layer.self_attn for layer in decoder_of(model).layers]
        taken = [
            m.register_forward_pre_hook(lambda m, a, k: hidden.append(k["hidden_states"]), with_kwargs=True)
            for m in modules
        ]
        with torch.no_grad():
            model(input_ids=fed, use_cache=False)
        for hook in taken:
            hook.remove()

        def factor(layer: int, head: int, row: int, among: list[int]) -> Tensor:
            width = calls[layer].value.shape[-1]
            part = modules[layer].o_proj.weight[:, head * width : (head + 1) * width]
            sizes = (calls[layer].value[0, head // 2, among] @ part.T).norm(dim=-1)
            return sizes / hidden[layer][0, row].norm()

        return factor

    with evicting(model, KVzip(**SETTINGS, plus=True), TIGHT) as cache, cache.hold():
        Conversation(model, cache).feed(ids)
        found = torch.stack(scores(cache))[:, 0]
    assert torch.allclose(found, repeated_truth(model, ids, weigh=weigh), atol=1e-5)


IMAGES = {
    "llava": (lambda: model_of("llava"), None),
    "qwen2_5_vl": (tiny_qwen2_5_vl, (4, (2, 3), 3, (3, 2), 5)),
    "qwen3_vl": (tiny_qwen3_vl, (4, (2, 3), 3, (3, 2), 5)),
}


def picture_prompt(shape: Any) -> dict[str, Tensor]:
    if shape is not None:
        return grid_inputs(*shape)
    ids = tokens(1, 9 + 2 * IMAGE_TOKENS, seed=1)
    for start in (3, 5 + IMAGE_TOKENS):
        ids[:, start : start + IMAGE_TOKENS] = IMAGE_TOKEN
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "pixel_values": pixels}


def twice(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same prompt written out two times, as the model itself would place it."""
    texts = ("input_ids", "mm_token_type_ids")
    return {name: torch.cat([x, x], 1 if name in texts else 0) for name, x in batch.items()}


@pytest.mark.parametrize("family", IMAGES)
def test_several_images_are_repeated_as_images(family):
    """Embeddings, three-axis coordinates and features of deeper layers are those of the prompt written twice."""
    build, shape = IMAGES[family]
    model, batch = build(), picture_prompt(shape)
    length = batch["input_ids"].shape[1]
    calls = plain(model, **{"ids" if k == "input_ids" else k: v for k, v in twice(batch).items()})
    expected = truth(calls, length, list(range(length)), list(range(length, 2 * length)))
    with evicting(model, KVzip(), TIGHT) as cache, cache.hold(), torch.no_grad():
        model(**batch, past_key_values=cache)
        found = torch.stack(scores(cache))[:, 0]
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_images_cut_by_chunks_keep_their_shape(family):
    """Chunks in the middle of images, opened by the tokens before them, at the places they had, moved."""
    build, shape = IMAGES[family]
    model, batch = build(), picture_prompt(shape)
    with evicting(model, KVzip(**SETTINGS), TIGHT) as cache, cache.hold(), torch.no_grad():
        model(**batch, past_key_values=cache)
        inputs = cache.tokens.inputs
        places, upcoming = inputs.parts[0].places[:, 0], int(inputs.next)
        seen: list[dict[str, Any]] = []
        decoder = model.get_decoder()
        forward = decoder.forward
        decoder.forward = lambda **kwargs: (seen.append(kwargs), forward(**kwargs))[1]
        try:
            scores(cache)
        finally:
            decoder.forward = forward
    length, visual = places.shape[1], batch["input_ids"][0] == IMAGE_TOKEN
    assert len(seen) == -(-length // CHUNK)
    for number, call in enumerate(seen):
        own = slice(max(number * CHUNK - OVERLAP, 0), (number + 1) * CHUNK)
        shift = upcoming - int(places[:, own].min())
        assert torch.equal(call["position_ids"][:, 0], places[:, own] + shift)
        if family == "qwen3_vl":
            assert torch.equal(call["visual_pos_masks"][0], visual[own])
            before, here = int(visual[: own.start].sum()), int(visual[own].sum())
            whole = inputs_deep(model, batch)
            for level, full in zip(call["deepstack_visual_embeds"], whole, strict=True):
                assert torch.equal(level, full[before : before + here])


def inputs_deep(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    caught: list[Any] = []
    hook = model.get_decoder().register_forward_pre_hook(lambda m, a, k: caught.append(k), with_kwargs=True)
    with torch.no_grad():
        model(**batch, use_cache=False)
    hook.remove()
    return caught[0]["deepstack_visual_embeds"]


# --- what it leaves behind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [KVzip(**SETTINGS), AttentionOracle()], ids=["kvzip", "oracle"])
def test_the_cache_does_not_advance(policy):
    model = model_of()
    before, count = snapshot(model), hooks(model)
    with evicting(model, policy, TIGHT) as cache:
        told = Conversation(model, cache)
        with cache.hold():
            told.feed(*PROMPT)
        cache.tokens.inputs.answers = answers([4, 3])
        known = [x.clone() for layer in cache.evicting_layers for x in layer.read()]
        inside, columns, seen = hooks(model), cache.columns, cache.seen().tolist()
        scores(cache)
        assert hooks(model) == inside
        assert (cache.columns, cache.seen().tolist(), cache.get_seq_length()) == (columns, seen, 24)
        assert all(
            torch.equal(a, b) for a, b in zip(known, (x for y in cache.evicting_layers for x in y.read()), strict=True)
        )
        assert cache.tokens.inputs.parts == []
        cache.evict()
        told.feed(tokens(2, 1))
        assert cache.kept().sum((0, 2)).tolist() == [7 * LAYERS * KV_HEADS] * 2
    assert snapshot(model) == before
    assert hooks(model) == count


def forwards(model: Any) -> tuple[list[int], Any]:
    """Counts attention calls of the first layer, by queries."""
    sizes: list[int] = []
    first = decoder_of(model).layers[0].self_attn
    return sizes, first.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )


def test_it_runs_once_at_the_end_and_only_where_something_has_to_leave():
    model = model_of()
    sizes, hook = forwards(model)
    try:
        for budget, expected in ((24.0, [24]), (23.0, [24, 9, 12, 9])):
            sizes.clear()
            with evicting(model, KVzip(**SETTINGS), CacheConfig(Budget(budget))) as cache:
                told = Conversation(model, cache)
                told.feed(tokens(1, 24, seed=1))
                told.feed(tokens(1, 1))
            assert sizes == [*expected, 1]
    finally:
        hook.remove()


def test_it_is_not_evicted_layer_by_layer_before_it_ran():
    """Under an allocator inside each layer too, every layer is whole when the prompt is fed once more."""
    results = []
    for config in (TIGHT, CacheConfig(Budget(6.0), allocator="uniform")):
        model = model_of()
        with evicting(model, KVzip(**SETTINGS), config) as cache:
            Conversation(model, cache).feed(*PROMPT)
            results.append(cache.kept_table())
    assert results[0].sum() == results[1].sum()
    assert (results[1].sum(-1) == 6).all()
    with evicting(model, KVzip(**SETTINGS), TIGHT) as cache, cache.hold():
        Conversation(model, cache).feed(*PROMPT)
        for layer, kv in enumerate(states(cache)):
            found = KVzip(**SETTINGS).score(kv)[0].topk(6).indices
            expected = torch.zeros(KV_HEADS, 24, dtype=torch.bool).scatter(1, found, True)
            assert torch.equal(results[1][layer, 0], expected)


def test_whole_heads_can_be_ranked():
    model, policy = model_of(), KVzip(**SETTINGS, head_level=True, recent_size=2)
    with evicting(model, policy, CacheConfig(Budget(12.0))) as cache, torch.no_grad():
        Conversation(model, cache).feed(tokens(1, 24, seed=1))
        table, counts = cache.kept_table()[:, 0], cache.kept()[:, 0].flatten()
    assert table[..., :SINKS].all()
    assert table[..., -2:].all()
    assert counts.sum() == 12 * LAYERS * KV_HEADS
    assert sorted(counts.tolist()) == [4, 4, 4, 12, 24, 24]
    with evicting(model, KVzip(**SETTINGS), TIGHT) as cache, cache.hold():
        Conversation(model, cache).feed(tokens(1, 24, seed=1))
        largest = torch.stack(scores(cache))[:, 0, :, SINKS:].amax(-1).flatten()
    order = largest.argsort(descending=True)
    assert counts[order].tolist() == [24, 24, 12, 4, 4, 4]
    assert table.flatten(0, 1)[order[2], -10:].all(), "the last of them keeps its newest"


def test_outside_the_block_it_says_where_it_works():
    model = model_of()
    with evicting(model, KVzip(**SETTINGS), TIGHT) as cache, cache.hold():
        Conversation(model, cache).feed(*PROMPT)
    with pytest.raises(ValueError, match=r"KVzip feeds the model once more .* inside the `with retention.evicting"):
        cache.evict()


def test_decoding_is_refused_as_for_every_policy_of_prompts():
    with (
        pytest.raises(ValueError, match="no rule for decoding"),
        evicting(model_of(), KVzip(), CacheConfig(Budget(6.0), evict_every=2)),
    ):
        pass


def test_frequencies_that_grow_are_what_they_were():
    model = tiny_llama(
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, max_position_embeddings=26
    )
    ids = tokens(1, 24, seed=1)
    with evicting(model, KVzip(), TIGHT) as cache, cache.hold(), torch.no_grad():
        model(ids, past_key_values=cache)
        before = decoder_of(model).rotary_emb.inv_freq.clone()
        scores(cache)
        after = decoder_of(model).rotary_emb
        assert torch.equal(after.inv_freq, before)
        assert after.max_seq_len_cached == 26


@pytest.mark.parametrize("build", [tiny_gemma3, tiny_qwen3_next])
def test_sliding_and_linear_layers_take_part_and_stay_as_they_are(build):
    """One chunk repeated behind the whole prompt is one plain forward over both."""
    model, ids = build(), tokens(1, 20, seed=1)
    calls = plain(model, torch.cat([ids, ids], 1))
    expected = truth(calls, 20, list(range(20)), list(range(20, 40)))
    with evicting(model, KVzip(), TIGHT) as cache, cache.hold(), torch.no_grad():
        model(ids, past_key_values=cache)
        others = [layer for layer in cache.layers if layer not in cache.evicting_layers]
        before = copy.deepcopy(others)
        found = torch.stack(scores(cache))[:, 0]
        for old, new in zip(before, others, strict=True):
            for name, x in vars(old).items():
                if torch.is_tensor(x):
                    assert same(getattr(new, name), x)
    assert torch.allclose(found, expected, atol=1e-4)


# --- batches, turns, chunks ---------------------------------------------------------------------------------


def turns(row: int | None = None, **options: Any) -> tuple[list[Tensor], Tensor, list[list[int]]]:
    """Scores at both evictions and later logits of two prompts with decoded tokens between."""
    model, found = model_of(), []
    with evicting(model, KVzip(**SETTINGS), CacheConfig(Budget(6.0), **options)) as cache:
        told, policy = Conversation(model, cache), cache.policy
        kept = KVzip.score

        def noted(kv: Any) -> Tensor:
            table = torch.zeros(*kv.valid.shape[:2], cache.columns)
            slots = kv.positions.clamp(min=0)
            found.append(table.scatter_reduce(-1, slots, kv.statistics["second_pass"] * kv.valid, "amax"))
            return kept(policy, kv)

        policy.score = noted
        logits = []
        rows = slice(None) if row is None else slice(row, row + 1)
        for number, (ids, mask) in enumerate(PADDED):
            real = mask[rows].any(0)
            told.feed(ids[rows][:, real], mask[rows][:, real])
            for step in range(2):
                logits.append(told.feed(tokens(2, 1, seed=10 * number + step)[rows]))
        return found, torch.cat(logits, 1), cache.kept().sum((0, 2)).tolist()


@pytest.mark.parametrize("options", [{}, {"prefill_chunk": 5}])
def test_a_padded_batch_equals_its_rows_over_two_turns(options):
    found, logits, kept = turns()
    for row in range(2):
        own, own_logits, own_kept = turns(row)
        assert kept[row] == own_kept[0] == 8 * LAYERS * KV_HEADS
        assert gap(logits[row], own_logits[0]) < 1e-5
        for a, b in zip(found, own, strict=True):
            assert torch.allclose(a[row, :, : b.shape[-1]], b[0], atol=1e-5)


def test_later_turns_repeat_what_is_new_and_the_rest_keeps_its_score():
    """The second decision: survivors of the first have what they had, answers and the new prompt are scored."""
    found, _, _ = turns(0)
    first, second = found[:LAYERS], found[LAYERS:]
    with evicting(model_of(), KVzip(**SETTINGS), TIGHT) as cache:
        Conversation(model_of(), cache).feed(PROMPT[0][:1])
        table = cache.kept_table()[:, 0]
    for layer in range(LAYERS):
        held = table[layer]
        assert torch.equal(second[layer][0, :, :24][held], first[layer][0][held])
        assert (second[layer][0, :, :24][~held] == 0).all()
        assert (second[layer][0, :, 24:] > 0).all()


def test_chunked_prefill_repeats_each_chunk_when_it_is_in():
    model, ids = model_of(), tokens(1, 24, seed=1)
    sizes, hook = forwards(model)
    try:
        with evicting(model, KVzip(**SETTINGS), CacheConfig(Budget(6.0), prefill_chunk=12)) as cache:
            Conversation(model, cache).feed(ids)
    finally:
        hook.remove()
    assert sizes == [12, 9, 3 + 3, 12, 9, 3 + 3]
    with evicting(model, KVzip(**SETTINGS), TIGHT) as apart:
        told = Conversation(model, apart)
        told.feed(ids[:, :12]), told.feed(ids[:, 12:])
    assert torch.equal(cache.kept_table(), apart.kept_table())


def test_a_fork_repeats_by_its_own_settings():
    model, chunks, found = model_of(), (9, 24), []
    with evicting(model, small("full"), extra_collectors=("second_pass",), tokenizer=Words()) as source:
        Conversation(model, source).feed(*PROMPT)
        held = source.bytes().physical["statistics"]
        for chunk in chunks:
            twin = source.fork(KVzip(**SETTINGS | {"chunk_size": chunk}), TIGHT)
            found.append(torch.stack(scores(twin)))
        assert source.bytes().physical["statistics"] == held > 0
        assert source.fork(small("knorm"), TIGHT).bytes().physical["statistics"] == 0
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    for chunk, forked in zip(chunks, found, strict=True):
        with evicting(model, KVzip(**SETTINGS | {"chunk_size": chunk}), TIGHT) as cache, cache.hold():
            Conversation(model, cache).feed(*PROMPT)
            assert torch.equal(torch.stack(scores(cache)), forked)


def test_beams_and_rows_follow():
    model = model_of()
    with evicting(model, KVzip(**SETTINGS), TIGHT) as cache, cache.hold():
        Conversation(model, cache).feed(*PROMPT)
        twin = cache.fork()
        cache.batch_select_indices(torch.tensor([1, 0, 0]))
        found, expected = torch.stack(scores(cache)), torch.stack(scores(twin))
    assert torch.allclose(found, expected[:, [1, 0, 0]], atol=1e-6)


def test_generate_needs_nothing_but_the_block():
    model, (ids, mask) = model_of(), PROMPT
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    with evicting(model, KVzip(**SETTINGS), TIGHT) as cache:
        out = model.generate(ids, past_key_values=cache, **options)
        assert cache.kept().sum((0, 2)).tolist() == [(6 + 4) * LAYERS * KV_HEADS] * 2
    with evicting(model, KVzip(**SETTINGS), CacheConfig(Budget(64.0))) as cache:
        full = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(full, model.generate(ids, **options))
    assert out.shape == full.shape


# --- answers ------------------------------------------------------------------------------------------------

DIALOGUE = tokens(2, 7, seed=5)
READING = torch.tensor([[0, 0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 1, 0, 0]]).bool()


def answers(lengths: list[int] | None = None) -> Answers:
    lengths = lengths or [7, 5]
    valid = torch.arange(7) < torch.tensor(lengths)[:, None]
    return Answers(DIALOGUE * valid, valid, READING & valid)


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("queries", ["answers", "all"])
def test_the_oracle_ranks_by_what_the_answers_heed(queries, reduction):
    model, policy, told_answers = model_of(), AttentionOracle(reduction=reduction, queries=queries), answers()
    with evicting(model, policy, TIGHT) as cache, cache.hold():
        Conversation(model, cache).feed(*PROMPT)
        cache.tokens.inputs.answers = told_answers
        found = torch.stack(scores(cache))
        kept = [torch.equal(policy.score(kv), kv.statistics["answer_pass"]) for kv in states(cache)]
        assert all(kept)
    for row, length in enumerate([24, 17]):
        ids = PROMPT[0][row : row + 1, -length:]
        valid = told_answers.valid[row]
        fed = torch.cat([ids, told_answers.ids[row : row + 1, valid]], 1)
        asking = valid if queries == "all" else told_answers.reading[row]
        rows = [length + i for i in asking.nonzero().flatten().tolist()]
        calls = plain(model, fed)
        each = torch.stack([truth(calls, length, list(range(length)), [r]) for r in rows])
        expected = each.amax(0)
        if reduction == "mean":
            expected = torch.zeros_like(expected)
            for number, call in enumerate(calls):
                for head in range(4):
                    for r in rows:
                        logits = call.scaling * call.key[0, head // 2, : r + 1] @ call.query[0, head, r]
                        expected[number, head // 2] += logits.softmax(0)[:length] / (2 * len(rows))
        assert torch.allclose(found[:, row, :, -length:], expected, atol=1e-5)


def test_the_oracle_keeps_the_newest_where_nothing_was_told():
    with evicting(model_of(), AttentionOracle(), TIGHT) as cache:
        Conversation(model_of(), cache).feed(tokens(1, 24, seed=1))
        assert cache.kept_table()[..., -6:].all()


def test_answers_for_other_rows_are_refused():
    with evicting(model_of(), AttentionOracle(), TIGHT) as cache:
        cache.tokens.inputs.answers = answers()
        with pytest.raises(ValueError, match="expected answers for 1 rows, as the cache holds, got 2"):
            Conversation(model_of(), cache).feed(tokens(1, 24, seed=1))


def test_the_modes_of_the_oracle():
    assert AttentionOracle() == AttentionOracle(mode="attention")
    assert Oracle(mode="attention").collectors == AttentionOracle().collectors == ("answer_pass",)
    assert Oracle().collectors == ("none",)
    assert Oracle().second_pass() is None
    for name, value in (("mode", "both"), ("reduction", "sum"), ("queries", "questions")):
        with pytest.raises(ValueError, match=f"expected oracle.{name} .*, got '{value}'"):
            Oracle(**{name: value})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"chunk_size": 8}, "kvzip.chunk_size"),
        ({"overlap": -1}, "kvzip.overlap"),
        ({"sinks": -1}, "kvzip.sinks"),
        ({"recent_size": -1}, "kvzip.recent_size"),
    ],
)
def test_impossible_settings_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        KVzip(**values)
