"""Where packing puts entries: the rule against its naive twin, and what the rule promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retention.ops.rope import naive_packed_coordinates, packed_coordinates
from tests import tiny

BUILDERS = {"qwen2_5_vl": tiny.tiny_qwen2_5_vl, "qwen3_vl": tiny.tiny_qwen3_vl}
part = st.one_of(st.integers(1, 4), st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)))


def coordinates_of(parts, interval=3):
    """Time, height and width, as Qwen2.5-VL gives them to texts (a length) and clips (frames, rows, columns)."""
    found, start = [], 0
    for item in parts:
        if isinstance(item, int):
            found.append(torch.arange(start, start + item).expand(3, -1))
            start += item
        else:
            axes = [torch.arange(item[0]) * interval, torch.arange(item[1]), torch.arange(item[2])]
            found.append(start + torch.cartesian_prod(*axes).view(-1, 3).T)
            start += max(item[1:])
    return torch.cat(found, 1)


def per_head(coordinates, heads=2):
    return coordinates[:, None, None].expand(-1, 1, heads, -1)


def random_case(seed, axes):
    """Two rows of three heads; coordinates need not be sorted, and dropped entries hold garbage."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.randint(3, 90, (1, 2, 3, 12), generator=generator)
    coordinates = boxes + torch.randint(0, 6, (axes, 2, 3, 12), generator=generator) * (axes > 1)
    keep = torch.rand(2, 3, 12, generator=generator) < torch.tensor([0.0, 0.4, 1.0])[:, None]
    coordinates = torch.where(keep, coordinates, torch.randint(-(10**9), 10**9, (12,), generator=generator))
    return coordinates, keep, torch.randint(40, 140, (2,), generator=generator)


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("seed", range(20))
def test_the_fast_rule_is_the_naive_one(seed, axes):
    coordinates, keep, end = random_case(seed, axes)
    found = packed_coordinates(coordinates, keep, end)
    assert torch.equal(found, naive_packed_coordinates(coordinates, keep, end))
    assert torch.equal(found.movedim(0, -1)[~keep], coordinates.movedim(0, -1)[~keep])


@pytest.mark.parametrize("seed", range(5))
def test_on_one_axis_the_kept_entries_end_right_before_the_next_token(seed):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.rand(2, 3, 50, generator=generator).argsort(-1)[..., :20].sort(-1).values
    keep, end = torch.rand(2, 3, 20, generator=generator) < 0.4, torch.tensor([50, 77])
    rank = keep.long().cumsum(-1) - keep.sum(-1, keepdim=True)
    expected = torch.where(keep, end[:, None, None] + rank - 1, positions)
    assert torch.equal(packed_coordinates(positions[None], keep, end)[0], expected)


@given(st.lists(part, min_size=1, max_size=6), st.integers(0, 5), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_what_packing_promises(parts, later, random):
    coordinates = coordinates_of(parts)
    tokens = coordinates.shape[1]
    kept = sorted(random.sample(range(tokens), random.randint(1, tokens)))
    keep = torch.zeros(1, 2, tokens, dtype=torch.bool)
    keep[0, 0, kept] = True
    end = coordinates.max() + 1 + later
    found = packed_coordinates(per_head(coordinates), keep, end[None])
    assert torch.equal(found[:, 0, 1], coordinates), "a head that keeps nothing"
    old, new = coordinates[:, kept], found[:, 0, 0, kept]
    assert new.max() == end - 1
    move = new - old
    assert (move >= 0).all()
    assert (move == move[0]).all(), "axes of one entry move together"
    before, after = old[:, :, None] - old[:, None], new[:, :, None] - new[:, None]
    assert (after.abs() <= before.abs()).all()
    assert (after.sign() == before.sign()).all(), "order is kept and nothing meets"
    across = (old.flatten()[:, None] - old.flatten()).sign()
    assert torch.equal((new.flatten()[:, None] - new.flatten()).sign(), across), "nor do different axes"


@given(st.lists(part, min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_packing_twice_is_packing_once(parts, random):
    coordinates = per_head(coordinates_of(parts), 1)
    once = torch.tensor([[[random.random() < 0.7 for _ in range(coordinates.shape[-1])]]])
    twice = once & torch.tensor([[[random.random() < 0.7 for _ in range(coordinates.shape[-1])]]])
    end = coordinates.amax()[None] + 1
    first = packed_coordinates(coordinates, once, end)
    found, expected = packed_coordinates(first, twice, end + 9), packed_coordinates(coordinates, twice, end + 9)
    assert torch.equal(found[:, twice], expected[:, twice])


def test_an_image_keeps_its_inner_geometry_and_text_closes_up():
    coordinates = coordinates_of([2, (1, 3, 4), 3])
    keep = torch.ones(2 + 12 + 3, dtype=torch.bool)
    keep[[0, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13]] = False  # of the image only (2, 3, 4): row 1, column 2
    found = packed_coordinates(per_head(coordinates, 1), keep[None, None], torch.tensor([9]))[:, 0, 0, keep]
    assert found.tolist() == [[2, 3, 6, 7, 8], [2, 4, 6, 7, 8], [2, 5, 6, 7, 8]]


def test_an_entry_beyond_the_next_position_stays():
    """Eviction between the chunks of a prompt: a clip's times outrun the text that follows it."""
    coordinates = coordinates_of([3, (4, 2, 2)], interval=10)
    keep = torch.ones(1, 1, 19, dtype=torch.bool)
    end = torch.tensor([5])
    assert torch.equal(packed_coordinates(per_head(coordinates, 1), keep, end), per_head(coordinates, 1))
    keep[..., 1] = False
    found = packed_coordinates(per_head(coordinates, 1), keep, end)[:, 0, 0]
    assert found[:, 0].tolist() == [1, 1, 1]
    assert torch.equal(found[:, 2:], coordinates[:, 2:])


def test_no_entries_at_all():
    empty = torch.zeros(3, 1, 2, 0, dtype=torch.long)
    assert packed_coordinates(empty, torch.zeros(1, 2, 0, dtype=torch.bool), torch.tensor([7])).shape == empty.shape


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_dtype_of_the_coordinates_is_kept(dtype):
    coordinates = torch.tensor([[[[0, 4, 9]]]], dtype=dtype)
    found = packed_coordinates(coordinates, torch.tensor([[[True, False, True]]]), torch.tensor([10]))
    assert found.dtype == dtype
    assert found.flatten().tolist() == [8, 4, 9]


def position_ids(family, kinds, **grids):
    """Coordinates and the next position of one prompt, by transformers itself."""
    kinds = torch.tensor([kinds])
    found, delta = BUILDERS[family]().model.get_rope_index(torch.zeros_like(kinds), mm_token_type_ids=kinds, **grids)
    return found, kinds.shape[1] + delta[0]


@pytest.mark.parametrize("family", BUILDERS)
def test_keeping_everything_moves_nothing_of_a_prompt_with_images(family):
    grid = torch.tensor([[1, 4, 6], [1, 8, 2]])
    found, end = position_ids(family, [0] * 3 + [1] * 6 + [0] * 2 + [1] * 4 + [0] * 4, image_grid_thw=grid)
    keep = torch.ones(1, 2, found.shape[-1], dtype=torch.bool)
    coordinates = found[:, :, None].expand(-1, -1, 2, -1)
    assert torch.equal(packed_coordinates(coordinates, keep, end), coordinates)
    assert not torch.equal(packed_coordinates(coordinates, keep, end + 1), coordinates)


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("text", [0, 1, 20])
def test_keeping_everything_moves_nothing_of_a_prompt_with_a_clip(family, text):
    frame = [2] * 4 + [0] * (family == "qwen3_vl")  # timestamps separate the frames of Qwen3-VL
    clip = {"video_grid_thw": torch.tensor([[3, 4, 4]])}
    if family == "qwen2_5_vl":
        clip["second_per_grid_ts"] = torch.tensor([1.5])
    found, end = position_ids(family, [0] * 2 + frame * 3 + [0] * text, **clip)
    keep = torch.ones(1, 1, found.shape[-1], dtype=torch.bool)
    assert torch.equal(packed_coordinates(found[:, :, None], keep, end), found[:, :, None])


def test_the_helper_of_this_file_counts_like_transformers():
    grid, kinds = torch.tensor([[3, 4, 6]]), [0] * 2 + [2] * 18 + [0] * 5
    found, _ = position_ids("qwen2_5_vl", kinds, video_grid_thw=grid, second_per_grid_ts=torch.tensor([0.75]))
    assert torch.equal(found[:, 0], coordinates_of([2, (3, 2, 3), 5]))
