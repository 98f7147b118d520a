"""Video frames, in the families that take them: marked as visual, at the right positions, evicted as everything else."""

import pytest
import torch

from retention import Budget, CacheConfig, RetentionGates, evicting
from retention.attach.positions import position_ids
from retention.gates.dbtrim import DBTrim
from retention.models import family_of
from retention.policies import POLICIES
from tests import hub, zoo
from tests.cache.helpers import gap, small
from tests.cache.truth import Hiding

FRAMES = 3
WORDS = [100, 110, 120]
VIDEOS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava_onevision", "internvl", "smolvlm"]


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def film(name):
    """A prompt with a short film between words: ids, what models take beside them, and how many tokens are visual."""
    config = zoo.loaded(name)[0].config
    if name in zoo.MROPE:
        frame = [config.video_token_id] * 4  # 4 x 4 patches, merged two by two
        apart = name.startswith("qwen3")  # Qwen3-VL writes a time stamp before every frame
        groups = [[130 + i, *frame] if apart else frame for i in range(FRAMES)]
        inside = [token for group in groups for token in group]
        ids = torch.tensor([[*WORDS, config.vision_start_token_id, *inside, config.vision_end_token_id, *WORDS]])
        kinds = (ids == config.video_token_id).long() * 2
        grid = {"video_grid_thw": torch.tensor([[FRAMES, 4, 4]]), "mm_token_type_ids": kinds}
        pixels = {"pixel_values_videos": noise(FRAMES * 16, 3 * 2 * hub.PATCH**2)}
        return {"input_ids": ids, **grid, **pixels}, FRAMES * 4
    if name == "llava_onevision":  # frames are pooled two by two; one token ends the film
        ids = torch.tensor([[*WORDS, *[config.video_token_id] * (FRAMES * 4 + 1), *WORDS]])
        return {"input_ids": ids, "pixel_values_videos": noise(1, FRAMES, 3, hub.SIDE, hub.SIDE)}, FRAMES * 4 + 1
    ids = torch.tensor([[*WORDS, *[config.image_token_id] * (FRAMES * 4), *WORDS]])
    pixels = noise(FRAMES, 3, hub.SIDE, hub.SIDE)
    return {"input_ids": ids, "pixel_values": pixels[None] if name == "smolvlm" else pixels}, FRAMES * 4


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_marked_and_change_what_is_read(name):
    (model, _), (inputs, count) = zoo.loaded(name), film(name)
    assert family_of(model).visual_mask(model.config, inputs["input_ids"]).sum() == count
    key = next(k for k in inputs if k.startswith("pixel_values"))
    other = inputs | {key: -inputs[key]}
    assert gap(model(**inputs).logits[:, -1], model(**other).logits[:, -1]) > 1e-4
    with evicting(model, small("knorm"), CacheConfig(Budget(512.0))) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        assert cache.evicting_layers[0].state().visual[0, 0].sum() == count


@pytest.mark.parametrize("name", VIDEOS)
def test_a_quarter_equals_the_hidden_full_cache(name):
    (model, _), (inputs, _) = zoo.loaded(name), film(name)
    gates = RetentionGates.for_model(DBTrim(gate_hidden=8, init_half_life=10.0), model)
    oracle, config = Hiding(model), CacheConfig(Budget(0.25, "fraction"))
    parts = [inputs, *({"input_ids": torch.tensor([ids])} for ids in ([140], [150], [160, 170, 180], [190]))]
    with evicting(model, POLICIES["db_trim_kv"](), config, gates=gates) as cache, torch.no_grad():
        for part in parts:
            assert gap(model(**part, past_key_values=cache).logits, oracle.feed(**part)) < 1e-4
            oracle.drop(cache)
        assert cache.evicted


@pytest.mark.parametrize("name", [name for name in VIDEOS if name in zoo.MROPE])
def test_positions_of_a_film_in_a_later_prompt_are_those_of_one_prompt(name):
    """The model itself gives them for a first prompt; ours are the same for any."""
    (model, _), (inputs, _) = zoo.loaded(name), film(name)
    before = torch.tensor([[140, 150, 160, 170]])
    ids = torch.cat([before, inputs["input_ids"]], 1)
    kinds = torch.cat([torch.zeros_like(before), inputs["mm_token_type_ids"]], 1)
    grid = {"video_grid_thw": inputs["video_grid_thw"]}
    whole, deltas = model.model.get_rope_index(
        ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **grid
    )
    with evicting(model, small("knorm"), CacheConfig(Budget(512.0))) as cache, torch.no_grad():
        first = position_ids(model, cache, before, torch.ones_like(before), {})
        assert torch.equal(first, whole[..., :4])
        model(input_ids=before, position_ids=first, past_key_values=cache)
        rest = {k: v for k, v in inputs.items() if k != "input_ids"}
        later = position_ids(model, cache, inputs["input_ids"], torch.ones_like(inputs["input_ids"]), rest)
        assert torch.equal(later, whole[..., 4:])
        assert torch.equal(cache.rope_deltas.flatten(), deltas.flatten())
        with pytest.raises(ValueError, match="expected mm_token_type_ids beside the images"):
            position_ids(model, cache, inputs["input_ids"], torch.ones_like(inputs["input_ids"]), grid)
