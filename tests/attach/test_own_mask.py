"""Gemma 3, whose image tokens see all of their image: kept exact through chunks, evictions and second turns."""

import pytest
import torch

from retention import Budget, CacheConfig, evicting
from retention.attach.chunks import chunk_ends
from retention.attach.positions import position_ids
from tests import zoo
from tests.cache.helpers import gap, small
from tests.cache.truth import Hiding

NAME = "gemma3"


def prompt(seed=0):
    _, processor = zoo.loaded(NAME)
    text = ["one <start_of_image> two <start_of_image> three", "<start_of_image> four"]
    images = [
        [zoo.picture(16, 16, seed=seed), zoo.picture(24, 32, seed=seed + 1)],
        [zoo.picture(20, 20, seed=seed + 2)],
    ]
    return dict(processor(text=text, images=images, padding=True, padding_side="left", return_tensors="pt"))


def feed(model, cache, inputs, mask):
    """One prompt through the model, with the mask of everything so far."""
    places = position_ids(model, cache, inputs["input_ids"], inputs["attention_mask"], inputs)
    given = inputs | {"attention_mask": mask, "position_ids": places}
    return given, model(**given, past_key_values=cache, use_cache=True).logits


def test_tokens_of_an_image_see_what_comes_behind_them():
    (model, _), inputs = zoo.loaded(NAME), prompt()
    plain = {k: v for k, v in inputs.items() if k != "token_type_ids"}
    assert gap(model(**inputs).logits, model(**plain).logits) > 1e-3


@pytest.mark.parametrize("options", [{"prefill_chunk": 5}, {"prefill_chunk": 3}, {"chunk_by_image": True}])
def test_chunks_within_the_budget_are_the_whole_prompt(options):
    (model, _), inputs = zoo.loaded(NAME), prompt()
    given = zoo.positioned(NAME, inputs)
    expected, real = model(**given).logits, inputs["attention_mask"]
    with evicting(model, small("knorm"), CacheConfig(Budget(512.0), **options)) as cache, torch.no_grad():
        assert gap(model(**given, past_key_values=cache).logits, expected, real) < 1e-5


@pytest.mark.parametrize("policy", ["knorm", "snapkv", "h2o"])
def test_a_second_prompt_with_images_equals_the_hidden_full_cache(policy):
    (model, _), oracle = zoo.loaded(NAME), Hiding(zoo.loaded(NAME)[0])
    with evicting(model, small(policy), CacheConfig(Budget(6.0))) as cache, torch.no_grad():
        mask = torch.zeros(2, 0, dtype=torch.long)
        for seed in (0, 5):
            inputs = prompt(seed)
            mask = torch.cat([mask, inputs["attention_mask"]], 1)
            given, got = feed(model, cache, inputs, mask)
            assert gap(got, oracle.feed(**given), inputs["attention_mask"]) < 1e-4
            oracle.drop(cache)
        assert cache.evicted


def test_chunks_end_behind_images():
    visual = torch.zeros(2, 12, dtype=torch.bool)
    visual[0, 2:6] = visual[1, 5:8] = True
    config = CacheConfig(Budget(4.0), prefill_chunk=3)
    assert chunk_ends(config, visual, 12, whole_images=True) == [8, 11, 12]
    assert chunk_ends(config, visual, 12) == [3, 6, 9, 12]
    assert chunk_ends(CacheConfig(Budget(4.0), prefill_chunk=2), visual[:1], 12, whole_images=True) == [2, 6, 8, 10, 12]
    by_image = CacheConfig(Budget(4.0), chunk_by_image=True)
    assert chunk_ends(by_image, visual, 12, whole_images=True) == [8, 12]
    assert chunk_ends(by_image, visual, 12) == [6, 8, 12]
