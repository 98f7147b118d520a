"""Spatial decay of the vision bank: the closed form is a scan over rows and columns, and images keep to themselves."""

import pytest
import torch

from retention import Budget, CacheConfig, evicting
from retention.attach.capture import capture_attention
from retention.attach.simulate import decide_eviction, simulate_eviction
from retention.memory import RetentionMemory
from retention.memory.linear import Linear
from retention.models import FAMILIES
from retention.models.family import model_shape
from retention.models.patches import patch_places
from retention.ops.spatial import geometric_log_gammas, root_places, spatial_decay
from retention.policies import POLICIES
from tests import tiny
from tests.cache.helpers import Conversation, gates_of, model_of, small, tokens
from tests.memory.test_memory import BATCH, HEADS, drawn, layer_of, part
from tests.tiny import IMAGE_SIZE, IMAGE_TOKEN, IMAGE_TOKENS

ROWS, COLUMNS = 3, 4


def grid(images=2):
    axes = torch.meshgrid(*(torch.arange(n) for n in (images, 1, ROWS, COLUMNS)), indexing="ij")
    return torch.stack(axes, -1).view(1, 1, -1, 4).expand(BATCH, HEADS, -1, -1)


def scores(seed=0):
    return torch.rand(
        BATCH, HEADS, 2 * ROWS * COLUMNS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def gammas():
    return torch.log(torch.tensor([[0.5, 0.6], [0.7, 0.8], [0.9, 0.95]], dtype=torch.float64))


def scanned(values, root, gamma):
    """Values [n, d] along a line, brought to the root from both ends, a step at a time."""
    forward, backward = torch.zeros_like(values[0]), torch.zeros_like(values[0])
    for i in range(root + 1):
        forward = gamma * forward + values[i]
    for i in range(len(values) - 1, root, -1):
        backward = gamma * (backward + values[i])
    return forward + backward


def test_a_scan_over_rows_then_columns_is_the_closed_form():
    places, score = grid(), scores()
    roots = root_places(places, score, "score")
    rho, values = (
        spatial_decay(places, roots, gammas()),
        torch.randn(BATCH, HEADS, 2, ROWS, COLUMNS, 5, dtype=torch.float64),
    )
    closed = (rho[..., None] * values.flatten(2, 4)).view(*values.shape[:3], -1, 5).sum(3)
    for b in range(BATCH):
        for h in range(HEADS):
            for n in range(2):
                y, x = divmod(int(score[b, h].view(2, -1)[n].argmax()), COLUMNS)
                lines = torch.stack([scanned(row, x, gammas()[2, h].exp()) for row in values[b, h, n]])
                assert (scanned(lines, y, gammas()[1, h].exp()) - closed[b, h, n]).abs().max() < 1e-12


def test_images_do_not_mix_roots():
    places, score = grid(), scores()
    other = score.clone()
    other[..., ROWS * COLUMNS :] = scores(1)[..., ROWS * COLUMNS :] + 5
    one, two = (root_places(places, x, "score") for x in (score, other))
    assert torch.equal(one[:, :, : ROWS * COLUMNS], two[:, :, : ROWS * COLUMNS])
    assert not torch.equal(one, two)
    shuffled = torch.randperm(places.shape[2], generator=torch.Generator().manual_seed(0))
    moved = root_places(places[:, :, shuffled], score[..., shuffled], "score")
    assert torch.equal(moved, one[:, :, shuffled])


def test_the_middle_may_be_the_root_and_what_is_no_patch_weighs_1():
    places = grid().clone()
    places[:, :, -1] = -1
    roots = root_places(places, scores(), "center")
    assert torch.equal(roots[0, 0, 0], torch.tensor([0.0, (ROWS - 1) / 2, (COLUMNS - 1) / 2], dtype=torch.float64))
    rho = spatial_decay(places, roots, gammas())
    assert rho[..., -1].eq(1).all()
    assert rho[..., :-1].lt(1).any()
    assert spatial_decay(places, roots, torch.zeros(3, HEADS)).eq(1).all()


def test_frames_decay_by_their_own_gamma():
    places = torch.tensor([[0, t, 0, 0] for t in range(4)]).expand(1, 2, 4, 4)
    roots = root_places(places, torch.tensor([1.0, 0.0, 0.0, 0.0]).double().expand(1, 2, 4), "score")
    assert torch.allclose(spatial_decay(places, roots, gammas())[0, 0], 0.5 ** torch.arange(4.0, dtype=torch.float64))


def test_gammas_span_the_range_of_retention_networks():
    found = geometric_log_gammas(8).exp()
    assert torch.allclose(1 - found[[0, -1]], torch.tensor([1 / 32, 1 / 512]), atol=1e-6)
    steps = (1 - found).log2().diff()
    assert torch.allclose(steps, steps[0].expand(7), atol=1e-3)


def test_patches_join_by_their_distance_and_text_does_not_care():
    evicted = drawn(16)
    near, plain = layer_of(Linear(spatial=True)), layer_of(Linear())
    weights = near.weight(evicted) / plain.weight(evicted)
    roots = root_places(evicted.places, 0.5 * (evicted.attention + evicted.entropy), "score")
    expected = spatial_decay(evicted.places, roots, geometric_log_gammas(HEADS).expand(3, -1))
    assert torch.allclose(weights, torch.where(evicted.visual, expected, 1.0))
    assert weights[evicted.visual].lt(1).any()
    learned = layer_of(Linear(spatial=True, gamma="learned"))
    assert torch.allclose(learned.weight(evicted), near.weight(evicted), atol=1e-6)
    evicted.places = None
    assert torch.equal(near.weight(evicted), plain.weight(evicted))
    assert part is not None


def test_square_images_are_laid_out_row_by_row():
    config, family = model_of("llava").config, FAMILIES["llava"]
    ids = tokens(2, 3 + 2 * IMAGE_TOKENS)
    ids[0, 1 : 1 + IMAGE_TOKENS], ids[1, 2 : 2 + 2 * IMAGE_TOKENS] = IMAGE_TOKEN, IMAGE_TOKEN
    places, side = patch_places(family, config, ids, {}), int(IMAGE_TOKENS**0.5)
    assert places[0, 1 : 1 + IMAGE_TOKENS].tolist() == [[0, 0, i // side, i % side] for i in range(IMAGE_TOKENS)]
    assert places[1, 2 + IMAGE_TOKENS : 2 + 2 * IMAGE_TOKENS, 0].eq(2).all()
    assert places[ids != IMAGE_TOKEN].eq(-1).all()
    ids[0, 1] = 5
    assert patch_places(family, config, ids, {}) is None
    assert patch_places(FAMILIES["llama"], None, ids, {}) is None


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_grids_of_the_processor_place_patches_after_merging(name):
    config = {"qwen2_5_vl": tiny.tiny_qwen2_5_vl, "qwen3_vl": tiny.tiny_qwen3_vl}[name]().config
    inputs = tiny.grid_inputs(3, (2, 4), 5, (3, 2), 4)
    places = patch_places(FAMILIES[name], config, inputs["input_ids"], inputs)
    assert places[0, 3:11, 0].eq(0).all()
    assert places[0, 3:11, 2:].tolist() == [[y, x] for y in range(2) for x in range(4)]
    assert places[0, 16:22, 2:].tolist() == [[y, x] for y in range(3) for x in range(2)]
    assert places[0, :3].eq(-1).all()
    assert patch_places(FAMILIES[name], config, inputs["input_ids"], {}) is None


def prompt():
    ids = tokens(1, 8 + 2 * IMAGE_TOKENS, seed=4)
    for start in (2, 4 + IMAGE_TOKENS):
        ids[0, start : start + IMAGE_TOKENS] = IMAGE_TOKEN
    return ids, torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


def memory_of(**changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        memory = RetentionMemory(
            Linear(features=4, hidden=8, spatial=True, gamma="learned", **changes), model_shape(model_of("llava"))
        )
        for name, parameter in memory.named_parameters():
            if "distance" in name:
                torch.nn.init.constant_(parameter, 0.5)
    return memory.requires_grad_(False)


@pytest.mark.parametrize("root", ["score", "center"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_a_cache_places_patches_as_training_does(root, chunk, tmp_path):
    model, memory = model_of("llava"), memory_of(root=root)
    ids, pixels = prompt()
    first, results = 4 + 2 * IMAGE_TOKENS, []
    with torch.no_grad(), capture_attention(model, gates_of("llava")) as capture:
        model(input_ids=ids, pixel_values=pixels, use_cache=False)
    eviction = decide_eviction(capture, capture.context(), POLICIES["trim_kv"](), 0.2)
    assert eviction.first == first
    for given in (memory, RetentionMemory(Linear(features=4, hidden=8), memory.shape)):
        if given is not memory:
            given.load_state_dict(memory.state_dict(), strict=False)
        with torch.no_grad(), simulate_eviction(model, eviction, given):
            results.append(model(input_ids=ids, pixel_values=pixels, use_cache=False).logits[:, first:])
    assert (results[0] - results[1]).abs().max() > 1e-4, "decay makes a difference"
    if chunk is not None:  # rows observed differ, places do not
        config = CacheConfig(Budget(100.0), on_evict="memory", prefill_chunk=chunk)
        with evicting(model, small("trim_kv"), config, gates=gates_of("llava"), memory=memory) as cache:
            Conversation(model, cache).feed(ids[:, :first], pixel_values=pixels)
            assert torch.equal(cache.tokens.places, capture.places[:, :first])
        return
    config = CacheConfig(Budget(0.2, "fraction"), on_evict="memory")
    with evicting(model, small("trim_kv"), config, gates=gates_of("llava"), memory=memory) as cache:
        told = Conversation(model, cache)
        told.feed(ids[:, :first], pixel_values=pixels)
        assert torch.equal(cache.kept_table()[..., :first], eviction.kept[..., :first])
        cache.save(tmp_path / "c.safetensors")
        with cache.hold():
            assert (told.feed(ids[:, first:]) - results[0]).abs().max() < 1e-4
        numbered = cache.tokens.places.clone()
        told.feed(ids[:, :first], pixel_values=pixels)
        assert cache.tokens.places[0, numbered.shape[1] + 2, 0] == 2
    with evicting(model, small("trim_kv"), config, gates=gates_of("llava"), memory=memory) as again:
        again.restore(tmp_path / "c.safetensors")
        assert torch.equal(again.tokens.places, numbered[:, :first])
