"""The evicting attachment: stock generation within the budget, sentences for misuse, nothing left behind."""

import copy

import pytest
import torch

from retention import POLICIES, Budget, CacheConfig, EvictingCache, RetentionGates, attach_gates, evicting
from retention.gates.trim import Trim
from tests.attach.helpers import FAMILIES, hooks, inputs_of, snapshot
from tests.cache.helpers import gates_of, model_of, small, tokens
from tests.tiny import IMAGE_TOKEN, tiny_llama

LENGTHS = [16, 11]
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
SAMPLING = OPTIONS | {"do_sample": True, "temperature": 1.5}
AMPLE = CacheConfig(Budget(64.0))


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("family", FAMILIES)
def test_within_the_budget_generation_is_stock_to_the_bit(family, name):
    from transformers import DynamicCache

    model, batch = model_of(family), inputs_of(family, LENGTHS)
    stock = model.generate(**batch, past_key_values=DynamicCache(config=model.config.get_text_config()), **OPTIONS)
    gates = gates_of(family)
    with evicting(model, small(name), AMPLE, gates=gates) as cache:
        out = model.generate(**batch, past_key_values=cache, **OPTIONS)
        assert not cache.evicted
        assert cache.get_seq_length() == 16 + 4
        assert cache.kept().unique().tolist() == [11 + 4, 16 + 4]
        seen = cache.evicting_layers[0].state().visual[:, 0, :16]
        assert torch.equal(seen, batch["input_ids"] == IMAGE_TOKEN)
    assert torch.equal(out.sequences, stock.sequences)
    for ours, theirs in zip(out.logits, stock.logits, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("allocator", ["uniform", "global"])
@pytest.mark.parametrize("name", ["knorm", "db_trim_kv"])
def test_sampling_within_the_budget_draws_stocks_tokens(name, allocator):
    model, batch = model_of(), inputs_of("llama", LENGTHS)
    torch.manual_seed(7)
    stock = model.generate(**batch, **SAMPLING)
    with evicting(model, small(name), CacheConfig(Budget(64.0), allocator=allocator), gates=gates_of()) as cache:
        torch.manual_seed(7)
        out = model.generate(**batch, past_key_values=cache, **SAMPLING)
    assert torch.equal(out.sequences, stock.sequences)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(out.logits, stock.logits, strict=True))
    torch.manual_seed(8)
    assert not torch.equal(model.generate(**batch, **SAMPLING).sequences, stock.sequences)


@pytest.mark.parametrize("allocator", ["uniform", "global"])
def test_sampling_below_the_budget_repeats_with_its_seed(allocator):
    model, batch = model_of(), inputs_of("llama", LENGTHS)
    config, drawn = CacheConfig(Budget(4.0), allocator=allocator, evict_every=2), []
    for seed in (7, 7, 8):
        with evicting(model, small("db_trim_kv"), config, gates=gates_of()) as cache:
            torch.manual_seed(seed)
            drawn.append(model.generate(**batch, past_key_values=cache, **SAMPLING).sequences)
            assert cache.kept().sum((0, 2)).tolist() == [4 * 6] * 2
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_below_the_budget_generation_differs_and_holds_the_budget(family):
    model, batch = model_of(family), inputs_of(family, LENGTHS)
    stock = model.generate(**batch, **OPTIONS)
    with evicting(model, small("db_trim_kv"), CacheConfig(Budget(4.0)), gates=gates_of(family)) as cache:
        out = model.generate(**batch, past_key_values=cache, **OPTIONS)
        assert cache.evicted
        assert cache.kept().sum((0, 2)).tolist() == [(4 + 4) * 6] * 2
    assert torch.equal(out.logits[0], stock.logits[0])
    assert (out.logits[1] - stock.logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_restores_the_model_exactly(family):
    model, batch = model_of(family), inputs_of(family, LENGTHS)
    before, count = snapshot(model), hooks(model)
    with evicting(model, small("knorm"), CacheConfig(Budget(4.0))) as cache:
        assert hooks(model) > count
        assert model.get_decoder().config._attn_implementation == "retention"
        model.generate(**batch, past_key_values=cache, **OPTIONS)
    assert snapshot(model) == before
    assert hooks(model) == count
    assert "forward" not in vars(model.get_decoder())
    assert model.get_decoder().config._attn_implementation == "sdpa"
    assert cache.kept().shape == (3, 2, 2)
    assert cache.bytes().total > 0
    with pytest.raises(RuntimeError, match="stop"), evicting(model, small("knorm")):
        raise RuntimeError("stop")
    assert snapshot(model) == before
    policy = small("knorm")
    policy.score = lambda kv: kv.values.norm(dim=-1) * torch.nan
    with pytest.raises(ValueError, match="finite"), evicting(model, policy, CacheConfig(Budget(4.0))) as cache:
        model.generate(**batch, past_key_values=cache, **OPTIONS)
    assert snapshot(model) == before
    with evicting(model, small("knorm")):
        pass


def test_another_attention_implementation_comes_back():
    model = copy.deepcopy(model_of())
    model.set_attn_implementation("eager")
    with evicting(model, small("knorm")):
        pass
    assert model.config._attn_implementation == "eager"


def test_a_forward_that_something_else_replaced_comes_back():
    """Offloading libraries put their own `forward` on a module; it is called inside and stays afterwards."""
    model, calls = copy.deepcopy(model_of()), []
    decoder = model.get_decoder()
    original = decoder.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    decoder.forward = counted
    with evicting(model, small("knorm"), CacheConfig(Budget(4.0))) as cache, torch.no_grad():
        model(tokens(1, 8), past_key_values=cache)
    assert len(calls) == 1
    assert vars(decoder).get("forward") is counted


def test_nesting_is_refused_and_leaves_the_outer_one():
    model = model_of()
    with evicting(model, small("knorm"), CacheConfig(Budget(4.0))) as cache, torch.no_grad():
        count = hooks(model)
        with pytest.raises(ValueError, match="attached already"), evicting(model, small("knorm")):
            pass
        with pytest.raises(ValueError, match="attached already"), attach_gates(model, gates_of()):
            pass
        assert hooks(model) == count
        model(tokens(1, 8), past_key_values=cache)
        assert (cache.kept() == 4).all()


def test_other_caches_and_no_cache_run_as_usual_inside():
    model, ids = model_of(), tokens(2, 10)
    with torch.no_grad():
        expected = model(ids).logits
        with evicting(model, small("db_trim_kv"), CacheConfig(Budget(4.0)), gates=gates_of()) as cache:
            assert torch.equal(model(ids).logits, expected)
            assert torch.equal(model(ids, use_cache=False).logits, expected)
            assert cache.columns == 0
            assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", ["trim_kv", "db_trim_kv"])
def test_a_policy_that_needs_gates_says_so(name):
    model = model_of()
    before = snapshot(model)
    with (
        pytest.raises(ValueError, match=r"ranks by trained gates and none were given; pass gates="),
        evicting(model, small(name)),
    ):
        pass
    assert snapshot(model) == before


def test_collecting_gates_without_gates_says_so():
    with pytest.raises(ValueError, match="gates"), evicting(model_of(), small("full"), extra_collectors=("gate",)):
        pass


@pytest.mark.parametrize("name", ["trim_kv", "snapkv", "h2o"])
def test_a_fork_to_a_policy_whose_input_was_not_collected_says_so(name):
    model = model_of()
    with evicting(model, small("full"), CacheConfig(Budget(4.0)), gates=gates_of()) as cache, torch.no_grad():
        model(tokens(1, 8), past_key_values=cache)
        with pytest.raises(ValueError, match="collect"):
            cache.fork(small(name)).evict()


def test_packing_what_was_evicted_at_original_positions_is_refused():
    """Its gaps are not known to the re-rotation any more; silently wrong positions would be the alternative."""
    model = model_of()
    with (
        evicting(model, small("random"), CacheConfig(Budget(4.0)), packed=True) as cache,
        torch.no_grad(),
    ):
        model(tokens(1, 12), past_key_values=cache)
        with pytest.raises(ValueError, match="packed"):
            cache.fork(config=CacheConfig(Budget(4.0), positions="packed"))


def test_gates_of_another_model_are_refused():
    other = RetentionGates.for_model(Trim(gate_hidden=8), tiny_llama(num_hidden_layers=2))
    with (
        pytest.raises(ValueError, match="evictable layers 2, the model has 3"),
        evicting(model_of(), small("trim_kv"), gates=other),
    ):
        pass


def test_a_mask_that_does_not_tell_padding_apart_is_refused():
    model = model_of()
    with (
        evicting(model, small("knorm")) as cache,
        torch.no_grad(),
        pytest.raises(ValueError, match="expected a 2-D attention mask"),
    ):
        model(tokens(1, 8), attention_mask=torch.zeros(1, 1, 8, 8), past_key_values=cache)


def test_layers_that_cannot_be_evicted_keep_their_own_cache():
    """A Qwen3 with sliding layers: only full-attention layers are managed, and generation is stock."""
    from tests.tiny import tiny_qwen3

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = tiny_qwen3(layer_types=kinds, sliding_window=8, use_sliding_window=True, initializer_range=0.15)
    batch = inputs_of("qwen3", LENGTHS)
    stock = model.generate(**batch, **OPTIONS)
    gates = RetentionGates.for_model(Trim(gate_hidden=8, init_half_life=10.0), model)
    with evicting(model, small("db_trim_kv"), AMPLE, gates=gates) as cache:
        assert [isinstance(layer, type(cache.evicting_layers[0])) for layer in cache.layers] == [False, True, False]
        out = model.generate(**batch, past_key_values=cache, **OPTIONS)
    assert torch.equal(out.sequences, stock.sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, stock.logits, strict=True))
    with evicting(model, small("db_trim_kv"), CacheConfig(Budget(5.0)), gates=gates) as cache:
        assert isinstance(cache, EvictingCache)
        model.generate(**batch, past_key_values=cache, **OPTIONS)
        assert cache.kept().sum((0, 2)).tolist() == [(5 + 4) * 2] * 2
