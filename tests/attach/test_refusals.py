"""What cannot work with entries gone says so in a sentence, and leaves model and cache as they were."""

import copy

import pytest
import torch

from retention import Budget, CacheConfig, evicting
from tests.cache.helpers import model_of, small, tokens
from tests.tiny import tiny_gemma3, tiny_llama

IDS = tokens(1, 12)
OPTIONS = {"max_new_tokens": 4, "do_sample": False}
CONFIG = CacheConfig(Budget(5.0))
INSIDE = r"inside the `with retention\.evicting"


@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_speculative_decoding(how):
    extra = {"assistant_model": tiny_llama(seed=1)} if how == "assistant" else {"prompt_lookup_num_tokens": 3}
    with (
        evicting(model_of(), small("knorm"), CONFIG) as cache,
        pytest.raises(NotImplementedError, match="cannot be cropped, because evicted entries cannot be rolled back"),
    ):
        model_of().generate(IDS, past_key_values=cache, **OPTIONS, **extra)


def test_another_kind_of_cache_at_once():
    with (
        evicting(model_of(), small("knorm"), CONFIG) as cache,
        pytest.raises(ValueError, match=r"`cache_implementation` .* and `past_key_values` .* unsupported"),
    ):
        model_of().generate(IDS, past_key_values=cache, cache_implementation="static", **OPTIONS)


@pytest.mark.parametrize("count", [-1, 0, 3])
def test_cropping(count):
    with evicting(model_of(), small("knorm"), CONFIG) as cache, torch.no_grad():
        model_of()(IDS, past_key_values=cache)
        table = cache.kept_table()
        for thing in (cache, *cache.layers):
            with pytest.raises(NotImplementedError, match="cannot be cropped"):
                thing.crop(count)
        assert torch.equal(cache.kept_table(), table)


@pytest.mark.parametrize("fed", [False, True])
def test_feeding_outside_the_block_is_refused_and_breaks_nothing(fed):
    with evicting(model_of(), small("knorm"), CONFIG) as cache, torch.no_grad():
        if fed:
            model_of()(IDS, past_key_values=cache)
            table = cache.kept_table()
    with torch.no_grad():
        for new in (IDS[:, :3], IDS[:, :1]):
            with pytest.raises(RuntimeError, match=INSIDE):
                model_of()(new, past_key_values=cache)
        with pytest.raises(RuntimeError, match=INSIDE):
            model_of().generate(IDS, past_key_values=cache, **OPTIONS)
    assert cache.get_seq_length() == (12 if fed else 0)
    with evicting(model_of(), small("knorm"), CONFIG), torch.no_grad():
        if fed:
            assert torch.equal(cache.kept_table(), table)
        model_of()(IDS[:, :7], past_key_values=cache)
        assert (cache.kept() == 5).all()


def test_feeding_a_hybrid_outside_the_block():
    model = tiny_gemma3()
    with evicting(model, small("knorm"), CONFIG) as cache, torch.no_grad():
        model(IDS, past_key_values=cache)
    with torch.no_grad(), pytest.raises(RuntimeError, match=INSIDE):
        model(IDS[:, :3], past_key_values=cache)


@pytest.mark.parametrize("rows", [1, 3])
def test_another_number_of_rows(rows):
    with evicting(model_of(), small("knorm"), CONFIG) as cache, torch.no_grad():
        model_of()(tokens(2, 12), past_key_values=cache)
        with pytest.raises(ValueError, match=f"the cache holds a batch of 2, the forward has {rows} rows"):
            model_of()(tokens(rows, 3), past_key_values=cache)
        model_of()(tokens(2, 7), past_key_values=cache)
        assert (cache.kept() == 5).all()


def test_a_copy_of_a_cache_is_made_by_fork():
    """`copy.deepcopy` copies the tensors and works on; nothing is shared."""
    with evicting(model_of(), small("knorm"), CacheConfig(Budget(5.0), positions="packed")) as cache, torch.no_grad():
        model_of()(IDS, past_key_values=cache)
        twin = copy.deepcopy(cache)
        expected = model_of()(IDS[:, :3], past_key_values=cache.fork()).logits
        assert torch.equal(model_of()(IDS[:, :3], past_key_values=twin).logits, expected)
        assert cache.get_seq_length() == 12
