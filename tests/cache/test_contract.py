"""What an evicting cache promises: batches, chunks, protection, turns, ties, statistics, forks, beams, budgets."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from retention import POLICIES, Budget, CacheConfig, EvictingCache, evicting
from retention.attach.chunks import chunk_ends
from tests.cache.helpers import (
    ANY_TIME,
    COLLECTED,
    DECODING,
    EVERY,
    EVICTING,
    KV_HEADS,
    LAYERS,
    ONE_FORWARD,
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
from tests.tiny import IMAGE_SIZE, IMAGE_TOKEN, IMAGE_TOKENS

HEADS = LAYERS * KV_HEADS
LENGTHS = [24, 17, 9]
CONTEXT = left_padded(tokens(3, 24, seed=1), LENGTHS)
QUESTION = left_padded(tokens(3, 8, seed=2), [3, 8, 5])
ANSWERS = tokens(3, 12, seed=3)
QUARTER = Budget(0.25, "fraction")


@contextmanager
def opened(name_or_policy: Any, config: CacheConfig, **options: Any) -> Iterator[tuple[EvictingCache, Conversation]]:
    policy = small(name_or_policy) if isinstance(name_or_policy, str) else name_or_policy
    with evicting(model_of(), policy, config, gates=gates_of(), **options) as cache:
        yield cache, Conversation(model_of(), cache)


def decode(told: Any, steps: int, rows: slice = slice(None), start: int = 0) -> Tensor:
    """Logits of the next tokens of `ANSWERS`, one at a time."""
    return torch.cat([told.feed(ANSWERS[rows, start + i, None]) for i in range(steps)], 1)


def row_alone(part: tuple[Tensor, Tensor], row: int) -> tuple[Tensor, Tensor]:
    ids, mask = part
    real = mask[row].bool()
    return ids[row : row + 1, real], mask[row : row + 1, real]


def tensors_of(cache: EvictingCache) -> list[Tensor]:
    return [tensor for group in cache.tensors().values() for tensor in group]


# --- batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVICTING)
def test_a_padded_batch_equals_its_rows_alone(name):
    with opened(name, CacheConfig(QUARTER)) as (cache, told):
        prompt = told.feed(*CONTEXT)
        table, kept, steps = cache.kept_table(), cache.kept(), decode(told, 6)
    for row, length in enumerate(LENGTHS):
        with opened(name, CacheConfig(QUARTER)) as (cache, told):
            assert gap(told.feed(*row_alone(CONTEXT, row)), prompt[row : row + 1, -length:]) < 1e-5
            assert torch.equal(cache.kept()[:, 0], kept[:, row])
            assert torch.equal(cache.kept_table()[:, 0], table[:, row, :, :length])
            assert gap(decode(told, 6, slice(row, row + 1)), steps[row : row + 1]) < 1e-5


@pytest.mark.parametrize("name", EVICTING)
def test_a_second_padded_turn_equals_its_rows_alone(name):
    with opened(name, CacheConfig(QUARTER)) as (cache, told):
        told.feed(*CONTEXT), decode(told, 2), told.feed(*QUESTION)
        table, seen, steps = cache.kept_table(), cache.seen().tolist(), decode(told, 3, start=2)
    for row in range(3):
        with opened(name, CacheConfig(QUARTER)) as (cache, told):
            rows = slice(row, row + 1)
            told.feed(*row_alone(CONTEXT, row)), decode(told, 2, rows), told.feed(*row_alone(QUESTION, row))
            assert torch.equal(cache.kept_table()[:, 0, :, : seen[row]], table[:, row, :, : seen[row]])
            assert gap(decode(told, 3, rows, start=2), steps[rows]) < 1e-5


def generated(name: str, ids: Tensor, mask: Tensor, config: CacheConfig) -> tuple[Tensor, Tensor]:
    with opened(name, config) as (cache, _):
        out = model_of().generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


@pytest.mark.parametrize("name", EVICTING)
def test_generate_on_a_padded_batch_equals_its_rows_alone(name):
    sequences, logits = generated(name, *CONTEXT, CacheConfig(QUARTER))
    for row in range(3):
        own_sequence, own_logits = generated(name, *row_alone(CONTEXT, row), CacheConfig(QUARTER))
        assert torch.equal(own_sequence[0], sequences[row])
        assert gap(own_logits[0], logits[row]) < 1e-5


# --- chunks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("name", EVERY)
def test_chunks_within_the_budget_equal_one_shot(name, chunk):
    results = []
    for size in (None, chunk):
        with opened(name, CacheConfig(Budget(40.0), prefill_chunk=size)) as (cache, told):
            results.append((told.feed(*CONTEXT), decode(told, 2), cache.kept()))
    assert gap(results[0][0], results[1][0], CONTEXT[1]) < 1e-5
    assert gap(results[0][1], results[1][1]) < 1e-5
    assert torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("name", [n for n in EVICTING if not {*POLICIES[n]().collectors} & ONE_FORWARD])
def test_a_chunk_end_with_nothing_over_budget_decides_nothing(name):
    ids, mask = left_padded(tokens(2, 20, seed=4), [20, 18])
    tables = []
    for chunk in (None, 16):
        with opened(name, CacheConfig(Budget(16.0), prefill_chunk=chunk)) as (cache, told):
            told.feed(ids, mask)
            tables.append(cache.kept_table())
    assert tables[0].sum() == 2 * 16 * HEADS
    assert torch.equal(*tables)


@pytest.mark.parametrize(("scope", "layers_at_once"), [("uniform", 1), ("global", LAYERS)])
def test_entries_never_exceed_budget_and_chunk(scope, layers_at_once):
    """Where heads decide for themselves, only one layer at a time holds a chunk on top of the budget."""
    held, scored = [], []

    def score(kv):
        held.append(cache.kept())
        scored.append(int(kv.valid.sum(-1).max()))
        return -kv.keys.norm(dim=-1)

    config = CacheConfig(Budget(6.0), allocator=scope, prefill_chunk=4)
    with evicting(model_of(), policy_with(score), config) as cache:
        Conversation(model_of(), cache).feed(tokens(1, 24))
        assert cache.kept().sum() == 6 * HEADS
    assert len(held) == 5 * LAYERS
    assert max(int(kept.sum()) for kept in held) == 6 * HEADS + 4 * KV_HEADS * layers_at_once
    if scope == "uniform":
        assert max(scored) == 6 + 4


@pytest.mark.parametrize("name", ["knorm", "snapkv", "h2o"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_a_last_chunk_of_one_token_is_evicted_too(name, chunk):
    with opened(name, CacheConfig(Budget(6.0), prefill_chunk=chunk)) as (cache, told):
        told.feed(tokens(1, 17))
        assert cache.kept().sum() == 6 * HEADS


def test_a_fraction_is_of_the_whole_prompt_under_chunks():
    with opened("knorm", CacheConfig(QUARTER, prefill_chunk=8)) as (cache, told):
        told.feed(*CONTEXT)
        assert cache.kept().sum((0, 2)).tolist() == [6 * HEADS, 4 * HEADS, 2 * HEADS]
    oldest = policy_with(lambda kv: -kv.positions.float())
    with opened(oldest, CacheConfig(QUARTER, prefill_chunk=8)) as (cache, told):
        told.feed(*CONTEXT)
        for row, budget in enumerate((6, 4, 2)):
            assert cache.kept_table()[:, row, :, :budget].all()


def test_chunks_end_after_every_image():
    visual = torch.zeros(1, 14, dtype=torch.bool)
    visual[0, 2:6] = visual[0, 8:12] = True
    assert chunk_ends(CacheConfig(chunk_by_image=True), visual, 14) == [6, 12, 14]
    assert chunk_ends(CacheConfig(prefill_chunk=5), visual, 14) == [5, 10, 14]
    assert chunk_ends(CacheConfig(prefill_chunk=7), visual, 14) == [7, 14]
    assert chunk_ends(CacheConfig(), visual, 14) == [14]


def test_chunks_by_image_bound_the_peak_by_one_image():
    model, held = model_of("llava"), []
    ids = tokens(1, 24, seed=5)
    for start in (3, 9, 15):
        ids[:, start : start + IMAGE_TOKENS] = IMAGE_TOKEN
    pixels = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))

    def score(kv):
        held.append((kv.layer, int(kv.valid.sum(-1).max())))
        return -kv.keys.norm(dim=-1)

    config = CacheConfig(Budget(4.0), chunk_by_image=True)
    with evicting(model, policy_with(score), config) as cache:
        Conversation(model, cache).feed(ids, pixel_values=pixels)
        visual = cache.evicting_layers[0].state().visual
        assert torch.equal(visual[0, 0], ids[0, cache.evicting_layers[0].state().positions[0, 0]] == IMAGE_TOKEN)
    assert [count for layer, count in held if layer == 2] == [7, 10, 10, 9]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", DECODING)
def test_decoding_never_holds_more_than_budget_and_interval(name, every):
    with opened(name, CacheConfig(Budget(6.0), evict_every=every)) as (cache, told):
        told.feed(tokens(3, 20))
        for step in range(7):
            told.feed(ANSWERS[:, step, None])
            mean = cache.kept().float().mean((0, 2))
            assert (mean == 6 + (step + 1) % every).all()


def test_decoded_tokens_stay_without_evict_every():
    with opened("knorm", CacheConfig(Budget(6.0))) as (cache, told):
        told.feed(tokens(3, 20))
        decode(told, 5)
        assert (cache.kept() == 11).all()
        assert cache.kept_table()[..., 20:25].all()


@pytest.mark.parametrize("name", ANY_TIME)
def test_evict_on_request_while_decoding(name):
    """The caller may ask at any time; entries no query of a prompt saw have no statistics yet."""
    with opened(name, CacheConfig(Budget(6.0)), extra_collectors=("column_sums",)) as (cache, told):
        told.feed(tokens(3, 20))
        for start in (0, 3):
            decode(told, 3, start=start)
            cache.evict()
            assert cache.kept().sum((0, 2)).tolist() == [6 * HEADS] * 3


def test_snapkv_on_request_needs_a_prompt_since_the_last_eviction():
    with opened("snapkv", CacheConfig(Budget(6.0))) as (cache, told):
        with cache.hold():
            told.feed(tokens(3, 20))
            decode(told, 2)
        cache.evict()
        assert (cache.kept() == 6).all()
        cache.evict()
        decode(told, 2)
        with pytest.raises(ValueError, match="prompt"):
            cache.evict()


# --- protection ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("name", EVICTING)
def test_sinks_and_recent_tokens_survive(name, scope):
    config = CacheConfig(Budget(8.0), allocator=scope, sink_size=2, recent_size=3)
    with opened(name, config) as (cache, told):
        for part in (CONTEXT, QUESTION):
            told.feed(*part)
            table = cache.kept_table()
            assert table[..., :2].all()
            for row, seen in enumerate(cache.seen().tolist()):
                assert table[:, row, :, seen - 3 : seen].all()


def test_protected_above_the_budget():
    with pytest.raises(ValueError, match=r"above sink_size \+ recent_size = 4, got 4 tokens; raise cache.budget"):
        CacheConfig(Budget(4.0), sink_size=2, recent_size=2)
    config = CacheConfig(Budget(0.1, "fraction"), sink_size=2, recent_size=3)
    with (
        opened("knorm", config) as (_, told),
        pytest.raises(ValueError, match="5 protected, budget for 2; raise the budget, or lower sink_size"),
    ):
        told.feed(tokens(1, 20))
    config = CacheConfig(Budget(0.1, "fraction"), allocator="global", sink_size=2, recent_size=3)
    with (
        opened("knorm", config) as (_, told),
        pytest.raises(ValueError, match=f"{5 * HEADS} protected, budget for {2 * HEADS}"),
    ):
        told.feed(tokens(1, 20))


def test_nan_scores_are_refused_except_on_padding():
    def score(kv: Any, bad: int) -> Tensor:
        return torch.where(kv.positions == bad, torch.nan, kv.positions.float())

    with (
        opened(policy_with(lambda kv: score(kv, 3)), CacheConfig(Budget(6.0))) as (_, told),
        pytest.raises(ValueError, match=r"finite scores .* NaN or inf"),
    ):
        told.feed(*CONTEXT)
    with opened(policy_with(lambda kv: score(kv, -1)), CacheConfig(Budget(6.0))) as (cache, told):
        told.feed(*CONTEXT)
        for row, length in enumerate(LENGTHS):
            assert cache.kept_table()[:, row, :, length - 6 : length].all()


def test_ties_keep_the_newest_then_the_lower_layer_and_head():
    with opened(policy_with(lambda kv: torch.zeros(kv.positions.shape)), CacheConfig(Budget(6.0))) as (cache, told):
        told.feed(*CONTEXT)
        expected = torch.zeros(3, 24, dtype=torch.bool)
        for row, length in enumerate(LENGTHS):
            expected[row, length - 6 : length] = True
        assert torch.equal(cache.kept_table(), expected[None, :, None].expand(LAYERS, 3, KV_HEADS, 24))

    def one_head_first(kv: Any) -> Tensor:
        best = torch.tensor([kv.layer == 1, 0.0])[None, :, None]
        return best.expand(kv.positions.shape).float()

    for floor, counts in ((0, [[1, 1], [10, 0], [0, 0]]), (1, [[1, 1], [7, 1], [1, 1]])):
        config = CacheConfig(Budget(2.0), allocator="global", min_per_head=floor)
        with opened(policy_with(one_head_first), config) as (cache, told):
            told.feed(tokens(1, 10))
            assert cache.kept()[:, 0].tolist() == counts
            assert cache.kept_table()[0, 0, 0, 9]


def test_selectors_layer_and_threshold():
    with opened("knorm", CacheConfig(Budget(6.0), selector="layer")) as (cache, told):
        told.feed(*CONTEXT)
        table = cache.kept_table()
        assert (table.sum(-1) == 6).all()
        assert torch.equal(table[:, :, 0], table[:, :, 1])
        assert not torch.equal(table[0], table[1])
    by_parity = policy_with(lambda kv: (kv.positions % 3 == 0).float())
    with opened(by_parity, CacheConfig(selector="threshold", threshold=0.5, recent_size=1)) as (cache, told):
        told.feed(tokens(1, 12))
        assert torch.nonzero(cache.kept_table()[1, 0, 1]).flatten().tolist() == [0, 3, 6, 9, 11]


# --- turns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["original", "packed"])
def test_length_and_positions_count_tokens_seen(positions):
    """Without explicit positions the model reads them off the cache's length."""
    model, oracle, ids = model_of(), Oracle(), tokens(1, 20)
    with opened("knorm", CacheConfig(Budget(6.0), positions=positions)) as (cache, _), torch.no_grad():
        model(ids, past_key_values=cache), oracle.feed(ids)
        oracle.drop(cache.kept_table(), packed=positions == "packed")
        for count in (5, 1, 3):
            new = ANSWERS[:1, :count]
            assert gap(model(new, past_key_values=cache).logits, oracle.feed(new)) < 1e-5
            if count > 1:
                oracle.drop(cache.kept_table(), packed=positions == "packed")
        assert cache.get_seq_length() == 29
        assert [layer.get_seq_length() for layer in cache.layers] == [29] * LAYERS
        assert cache.seen().tolist() == [29]


def test_a_second_turn_through_generate():
    model, (ids, mask) = model_of(), CONTEXT
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with opened("db_trim_kv", CacheConfig(Budget(6.0))) as (cache, told):
        first = model.generate(ids, attention_mask=mask, past_key_values=cache, **options).sequences
        assert cache.get_seq_length() == 26
        question, more = QUESTION
        both, both_mask = (
            torch.cat([first, question], 1),
            torch.cat([mask, torch.ones(3, 3, dtype=mask.dtype), more], 1),
        )
        second = model.generate(both, attention_mask=both_mask, past_key_values=cache, **options)
    with opened("db_trim_kv", CacheConfig(Budget(6.0))) as (_, told):
        told.feed(ids, mask)
        for step in range(24, 26):
            told.feed(first[:, step, None])
        last = told.feed(both[:, 26:], both_mask[:, 26:])[:, -1:]
        for step in range(3):
            assert gap(second.logits[step][:, None], last) < 1e-5
            last = told.feed(second.sequences[:, 35 + step, None])


def test_hold_evicts_nothing_inside():
    with opened("knorm", CacheConfig(Budget(6.0), evict_every=2)) as (cache, told):
        told.feed(*CONTEXT)
        with cache.hold(), cache.hold():
            told.feed(*QUESTION)
            decode(told, 4)
            counts = torch.tensor([6 + 3, 6 + 8, 6 + 5]) + 4
            assert torch.equal(cache.kept(), counts[None, :, None].expand(LAYERS, 3, KV_HEADS))
        with pytest.raises(RuntimeError, match="stop"), cache.hold():
            raise RuntimeError("stop")
        told.feed(*QUESTION)
        assert (cache.kept() == 6).all()


def test_a_fork_made_on_hold_is_not_on_hold():
    with opened("knorm", CacheConfig(Budget(6.0))) as (cache, told):
        told.feed(*CONTEXT)
        with cache.hold():
            fork = cache.fork()
        assert fork.automatic
        assert cache.automatic


def test_reset_forgets_everything():
    with opened("h2o", CacheConfig(Budget(6.0), evict_every=4)) as (cache, told):
        first = [told.feed(*CONTEXT), decode(told, 5), cache.kept_table()]
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.bytes().total == 0
        assert cache.seen().sum() == 0
        told.mask = None
        again = [told.feed(*CONTEXT), decode(told, 5), cache.kept_table()]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_cannot_be_done_is_refused():
    with opened("knorm", CacheConfig(Budget(6.0)), extra_collectors=("window_rows",)) as (cache, told):
        assert not cache.is_croppable
        with pytest.raises(NotImplementedError, match="cannot be cropped"):
            cache.crop(1)
        with pytest.raises(ValueError, match="packed' needs the model's rotary frequencies"):
            cache.fork(config=CacheConfig(positions="packed"))
        told.feed(tokens(2, 12))
        with pytest.raises(NotImplementedError, match="cannot be cropped"):
            cache.layers[1].crop(-1)
        with pytest.raises(ValueError, match="holds a batch of 2, the forward has 1 rows"):
            told.model(tokens(1, 3), past_key_values=cache)
        with pytest.raises(ValueError, match="SnapKV decides after the prompt only"):
            cache.fork(small("snapkv"), CacheConfig(evict_every=2))
    with (
        pytest.raises(ValueError, match="SnapKV decides after the prompt only"),
        opened("snapkv", CacheConfig(evict_every=2)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="selector 'head' and allocator 'global' do not fit"),
        opened("knorm", CacheConfig(Budget(2.0), selector="head", allocator="global")) as (_, told),
    ):
        told.feed(tokens(1, 12))


# --- statistics ---------------------------------------------------------------------------------------------


def eager_attention(ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Attention per layer and KV head from transformers' eager implementation; padded queries zeroed."""
    model = copy.deepcopy(model_of())
    model.set_attn_implementation("eager")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions, output_attentions=True, use_cache=False)
    return [a.unflatten(1, (KV_HEADS, -1)).mean(2) * mask[:, None, :, None] for a in out.attentions]


@pytest.mark.parametrize("chunk", [None, 5])
def test_attention_received_equals_eager_attention(chunk):
    """H2O's sums, over a padded prompt in one or several chunks and three decoded tokens."""
    ids, mask = CONTEXT
    with opened("h2o", CacheConfig(Budget(40.0), prefill_chunk=chunk, evict_every=2)) as (cache, told):
        told.feed(ids, mask)
        decode(told, 3)
        observed = [layer.observed["column_sums"] for layer in cache.evicting_layers]
    rows = eager_attention(
        torch.cat([ids, ANSWERS[:, :3]], 1), torch.cat([mask, torch.ones(3, 3, dtype=mask.dtype)], 1)
    )
    real = torch.cat([mask.bool(), torch.ones(3, 3, dtype=torch.bool)], 1)[:, None].expand(3, KV_HEADS, 27)
    for got, row in zip(observed, rows, strict=True):
        assert (got - row.sum(2))[real].abs().max() < 1e-5


def test_window_rows_equal_eager_attention():
    """SnapKV's window, the last rows of the prompt."""
    seen: dict[int, Tensor] = {}

    def score(kv: Any) -> Tensor:
        seen[kv.layer] = kv.statistics["window_rows"]
        return kv.positions.float()

    ids, mask = CONTEXT
    with opened(policy_with(score, collector="window_rows"), CacheConfig(Budget(6.0))) as (_, told):
        told.feed(ids, mask)
    for layer, row in enumerate(eager_attention(ids, mask)):
        real = mask[:, None, None, :].bool() & mask[:, None, :, None].bool()
        difference = (seen[layer] - row) * real
        assert difference.abs().max() < 1e-5
        assert seen[layer].shape[2] == 24


def test_attention_received_follows_its_entries_through_an_eviction():
    """After ragged evictions, each kept entry has what it received before plus what it received since."""
    oracle, config = Oracle(), CacheConfig(Budget(6.0), allocator="global")
    totals = torch.zeros(LAYERS, 2, KV_HEADS, 60)
    with opened("h2o", config) as (cache, told):
        for turn in range(3):
            new = tokens(2, 20 - 6 * turn, seed=turn)
            with cache.hold():
                told.feed(new), oracle.feed(new)
            for layer in range(LAYERS):
                received = oracle.weights[layer].unflatten(1, (KV_HEADS, -1)).mean(2).sum(2)
                totals[layer, :, :, : received.shape[-1]] += received
            for number, layer in enumerate(cache.evicting_layers):
                state = layer.state()
                expected = totals[number].gather(-1, state.positions)
                assert ((state.statistics["column_sums"] - expected) * state.valid).abs().max() < 1e-5
            cache.evict()
            assert cache.kept().unique().numel() > 1
            oracle.drop(cache.kept_table(), packed=False)


# --- forks --------------------------------------------------------------------------------------------------

FORKABLE = {"extra_collectors": COLLECTED, "packed": True}


@pytest.mark.parametrize("positions", ["original", "packed"])
@pytest.mark.parametrize("name", EVICTING)
def test_a_fork_with_another_policy_equals_a_separate_run(name, positions):
    config = CacheConfig(Budget(6.0), positions=positions)
    with opened(name, config) as (cache, told):
        told.feed(*CONTEXT)
        table, steps = cache.kept_table(), decode(told, 3)
    with opened("full", CacheConfig(Budget(6.0)), **FORKABLE) as (source, prefill):
        prefill.feed(*CONTEXT)
        before = [x.clone() for x in tensors_of(source)]
        other = source.fork(small("random"), CacheConfig(Budget(3.0), positions=positions))
        other.evict()
        twin = source.fork(small(name), config)
        twin.evict()
        told = Conversation(model_of(), twin)
        told.mask = prefill.mask
        assert torch.equal(twin.kept_table(), table)
        assert gap(decode(told, 3), steps) < 1e-5
        told.feed(*QUESTION)
        after = tensors_of(source)
        assert len(before) == len(after)
        assert all(same(a, b) for a, b in zip(before, after, strict=True))
        assert (other.kept() == 3).all() or other.kept().sum() == 3 * 3 * HEADS


@pytest.mark.parametrize("name", EVICTING)
def test_a_fork_of_an_evicted_cache_continues_as_its_source_would(name):
    with opened(name, CacheConfig(Budget(6.0))) as (source, told):
        told.feed(*CONTEXT)
        decode(told, 2)
        twin = Conversation(model_of(), source.fork())
        twin.mask = told.mask
        before = [x.clone() for x in tensors_of(source)]
        results = [twin.feed(*QUESTION), decode(twin, 3), twin.cache.kept_table()]
        assert all(same(a, b) for a, b in zip(before, tensors_of(source), strict=True))
        assert source.get_seq_length() == 26
        assert source.seen().tolist() == [26, 19, 11]
        again = [told.feed(*QUESTION), decode(told, 3), source.kept_table()]
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


def test_a_fork_keeps_counting_towards_the_next_eviction():
    with opened("knorm", CacheConfig(Budget(6.0), evict_every=3)) as (source, told):
        told.feed(*CONTEXT)
        decode(told, 2)
        twin = Conversation(model_of(), source.fork())
        twin.mask = told.mask
        twin.feed(ANSWERS[:, 2, None]), told.feed(ANSWERS[:, 2, None])
        assert (source.kept() == 6).all()
        assert (twin.cache.kept() == 6).all()


# --- rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reorder", "select", "repeat"])
@pytest.mark.parametrize("name", ["h2o", "db_trim_kv"])
def test_rows_follow_their_indices(name, how):
    rows = torch.tensor({"reorder": [2, 0, 1], "select": [2, 0], "repeat": [0, 0, 1, 1, 2, 2]}[how])
    change = {
        "reorder": lambda cache: cache.reorder_cache(rows),
        "select": lambda cache: cache.batch_select_indices(rows),
        "repeat": lambda cache: cache.batch_repeat_interleave(2),
    }[how]
    config = CacheConfig(QUARTER, allocator="global", positions="packed")
    with opened(name, config) as (source, told):
        told.feed(*CONTEXT)
        decode(told, 1)
        twin = Conversation(model_of(), source.fork())
        change(twin.cache)
        twin.mask = told.mask[rows]
        assert torch.equal(twin.cache.kept_table(), source.kept_table()[:, rows])
        for ids, mask in ((ANSWERS[:, 1:2], torch.ones(3, 1, dtype=torch.long)), QUESTION, (ANSWERS[:, 2:3], None)):
            moved = twin.feed(ids[rows], None if mask is None else mask[rows])
            assert gap(moved, told.feed(ids, mask)[rows], None if mask is None else mask[rows]) < 1e-5
        assert torch.equal(twin.cache.kept_table(), source.kept_table()[:, rows])


def test_rows_may_be_selected_right_before_an_eviction():
    with opened("knorm", CacheConfig(QUARTER)) as (cache, told):
        with cache.hold():
            told.feed(*CONTEXT)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.evict()
        assert cache.kept().sum((0, 2)).tolist() == [2 * HEADS, 6 * HEADS]


BEAMS = {
    "max_new_tokens": 4,
    "num_beams": 2,
    "num_return_sequences": 2,
    "do_sample": False,
    "output_scores": True,
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("name", EVERY)
def test_beams_within_the_budget_are_stock_beams(name):
    ids, mask = CONTEXT
    stock = model_of().generate(ids, attention_mask=mask, **BEAMS)
    with opened(name, CacheConfig(Budget(40.0))) as (cache, _):
        out = model_of().generate(ids, attention_mask=mask, past_key_values=cache, **BEAMS)
    assert torch.equal(out.sequences, stock.sequences)
    assert (out.sequences_scores - stock.sequences_scores).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["knorm", "db_trim_kv"])
def test_beams_at_half_the_context_equal_the_masked_full_cache(name):
    """All beams of a row start from the same eviction, so the oracle's hidden entries need no reordering."""
    (ids, mask), config = CONTEXT, CacheConfig(Budget(0.5, "fraction"))
    with opened(name, config) as (cache, _):
        out = model_of().generate(ids, attention_mask=mask, past_key_values=cache, **BEAMS)
    with opened(name, config) as (cache, told):
        told.feed(ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0))
        table = cache.kept_table()
    oracle = Oracle()

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        new = kwargs["input_ids"]
        if oracle.mask.shape[1] == ids.shape[1]:
            oracle.drop(table, packed=False)
        oracle.advance(new, kwargs["attention_mask"][:, -new.shape[1] :].long())
        full = torch.ones_like(kwargs["attention_mask"])
        return args, {**kwargs, "position_ids": torch.zeros_like(new), "attention_mask": full}

    hook = oracle.model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        truth = oracle.model.generate(ids, attention_mask=mask, **BEAMS)
    finally:
        hook.remove()
    assert torch.equal(out.sequences, truth.sequences)
    assert (out.sequences_scores - truth.sequences_scores).abs().max() < 1e-5
    stock = model_of().generate(ids, attention_mask=mask, **BEAMS)
    assert (out.sequences_scores - stock.sequences_scores).abs().max() > 1e-4


# --- budgets ------------------------------------------------------------------------------------------------


def test_budgets_in_tokens_fractions_and_bytes():
    kv = 2 * 16 * 4 + 4
    for budget, expected in (
        (Budget(5.0), [5, 5, 5]),
        (Budget(0.25, "fraction"), [6, 4, 2]),
        (Budget(7.5 * kv * HEADS, "bytes"), [7, 7, 7]),
    ):
        with opened("knorm", CacheConfig(budget)) as (cache, told):
            told.feed(*CONTEXT)
            assert cache.resolved == expected
            assert cache.kept().sum((0, 2)).tolist() == [n * HEADS for n in expected]


def test_bytes_pay_for_everything_that_is_stored_per_entry():
    limit = 4000.0
    with opened("db_trim_kv", CacheConfig(Budget(limit, "bytes"))) as (cache, told):
        told.feed(tokens(1, 24))
        physical = cache.bytes().physical
        stored = sum(physical[item] for item in ("keys", "values", "positions", "scores"))
        assert physical["scores"] > 0
        assert limit - HEADS * (2 * 16 * 4 + 8) < stored <= limit


def test_budgets_may_be_written_as_whole_numbers():
    with opened("knorm", CacheConfig(Budget(5))) as (cache, told):
        told.feed(tokens(1, 12))
        assert (cache.kept() == 5).all()


# --- gates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 9])
def test_gates_rank_what_their_layer_reads(chunk):
    """The pool's winners, ranked by hand from the gates' outputs on each layer's attention input."""
    model, gates, read = model_of(), gates_of(), {}
    (ids, mask), handles = CONTEXT, []
    for number, layer in enumerate(model.get_decoder().layers):
        handles.append(
            layer.self_attn.register_forward_pre_hook(
                lambda _, __, kwargs, number=number: read.update({number: kwargs["hidden_states"]}), with_kwargs=True
            )
        )
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
        log_beta = torch.stack([gates(number, read[number]) for number in range(LAYERS)])
    for handle in handles:
        handle.remove()
    with opened("db_trim_kv", CacheConfig(Budget(5.0), prefill_chunk=chunk)) as (cache, told):
        with cache.hold():
            told.feed(ids, mask)
        states = [layer.state() for layer in cache.evicting_layers]
        assert all((s.log_beta - b)[s.valid].abs().max() < 1e-5 for s, b in zip(states, log_beta, strict=True))
        cache.evict()
        table = cache.kept_table()
    for row, length in enumerate(LENGTHS):
        own = log_beta[:, row, :, -length:].reshape(HEADS, length)
        scored = sorted(
            ((length - place) * float(own[head, place]), place, head)
            for head in range(HEADS)
            for place in range(length)
        )
        winners = {(head, place) for _, place, head in scored[::-1][: 5 * HEADS]}
        kept = torch.nonzero(table[:, row].reshape(HEADS, -1)).tolist()
        assert {(head, place) for head, place in kept} == winners
