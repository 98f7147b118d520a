"""InfiniPot-V against its formulas, written out patch by patch."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from retention import Budget, CacheConfig, evicting
from retention.ops.frames import frame_table, likeness, naive_likeness, naive_pooled, pooled
from retention.policies.infinipot_v import KERNELS, InfiniPotV
from tests.cache.helpers import Conversation, gap, left_padded, model_of, tokens
from tests.policies.test_matrix import HEADS, ROWS, state, winners, with_holes
from tests.tiny import IMAGE_SIZE, IMAGE_TOKEN, IMAGE_TOKENS, tiny_llava

BOS, GAP = 2, 1


def video(*sizes: int, layer: int = 0, layers: int = 4, seed: int = 0) -> Any:
    """BOS text, then frames of so many patches with one token of text behind each."""
    marks = [False] * BOS
    for size in sizes:
        marks += [True] * size + [False] * GAP
    kv = state(keys=len(marks), layer=layer, seed=seed)
    visual = torch.tensor(marks).expand(ROWS, HEADS, len(marks)).clone()
    return replace(kv, visual=visual, layers=layers)


def parts(kv: Any) -> tuple[Any, Any, Any]:
    table = frame_table(kv.visual[:, 0])
    return tuple(x[:, None].expand(kv.valid.shape).contiguous() for x in table)


def patch_slots(*sizes: int) -> list[list[int]]:
    found, start = [], BOS
    for size in sizes:
        found.append(list(range(start, start + size)))
        start += size + GAP
    return found


def test_frames_are_runs_of_visual_positions():
    visual = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 1], [0] * 8]).bool()
    frame, place, size = frame_table(visual).tolist()
    assert frame == [[-1, 0, 0, -1, 1, 1, 1, -1], [0, 0, -1, -1, -1, -1, -1, 1], [-1] * 8]
    assert place == [[0, 0, 1, 0, 0, 1, 2, 0], [0, 1, 0, 0, 0, 0, 0, 0], [0] * 8]
    assert size == [[0, 2, 2, 0, 3, 3, 3, 0], [2, 2, 0, 0, 0, 0, 0, 1], [0] * 8]
    assert frame_table(visual[:, :0]).shape == (3, 3, 0)


def test_tar_is_the_mean_cosine_with_the_same_patch_of_recent_frames():
    """Eight frames of four patches: the last two are recent."""
    kv, slots = video(*[4] * 8), patch_slots(*[4] * 8)
    score = InfiniPotV().score(kv)
    for row in range(ROWS):
        for head in range(HEADS):
            keys = F.normalize(kv.keys[row, head], dim=-1)
            for frame in range(6):
                for p in range(4):
                    wanted = -sum(float(keys[slots[frame][p]] @ keys[slots[r][p]]) for r in (6, 7)) / 2
                    assert float(score[row, head, slots[frame][p]]) == pytest.approx(wanted, abs=1e-5)
            assert (score[row, head, slots[6] + slots[7]] > 1).all()


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (9, 4, 9, 4, 4), (6, 6, 6), (1, 2)])
@pytest.mark.parametrize("holes", [False, True])
def test_fast_forms_equal_the_naive_ones(sizes, holes):
    kv = video(*sizes)
    held = kv.visual.clone()
    if holes:
        held &= torch.rand(held.shape, generator=torch.Generator().manual_seed(1)) > 0.4
    frame, place, size = parts(kv)
    recent = held & (frame >= len(sizes) - 2)
    found = likeness(kv.keys, held, frame, place, size, recent)
    assert torch.allclose(found, naive_likeness(kv.keys, held, frame, place, size, recent), atol=1e-5)
    assert (found != 0).any()
    norms = kv.values.norm(dim=-1)
    for reach in (*KERNELS, (3, 3, 3)):
        mean, truth = (f(norms, held, frame, place, size, reach)[held] for f in (pooled, naive_pooled))
        assert torch.allclose(mean, truth, atol=1e-5), reach


def test_van_pools_by_depth():
    """A square frame of 3 x 3 between two others: the centre's mean over frames, over the frame, over its row, alone."""
    slots = patch_slots(9, 9, 9)
    for quarter, among in enumerate(([*slots[0], *slots[1], *slots[2]], slots[1], slots[1][3:6], slots[1][4:5])):
        for layer in (2 * quarter, 2 * quarter + 1):
            kv = video(9, 9, 9, layer=layer, layers=8)
            norms = kv.values.norm(dim=-1)
            found = InfiniPotV().second_score(kv, norms)
            assert torch.allclose(found[..., slots[1][4]], norms[..., among].mean(-1), atol=1e-5)
            assert torch.equal(found[~kv.visual], norms[~kv.visual])
    corner = InfiniPotV().second_score(kv := video(9, 9, layer=1, layers=4), kv.values.norm(dim=-1))
    near = [slots[0][i] for i in (0, 1, 2, 3, 4, 5, 6, 7, 8)]
    assert torch.allclose(corner[..., slots[0][0]], kv.values.norm(dim=-1)[..., near].mean(-1), atol=1e-5)


def test_frames_of_other_sizes_are_compared_among_themselves():
    kv, slots = video(9, 4, 9, 4), patch_slots(9, 4, 9, 4)
    score = InfiniPotV().score(kv)
    assert (score[..., slots[0] + slots[2]] == 0).all(), "the one recent frame has another size"
    keys = F.normalize(kv.keys, dim=-1)
    wanted = -(keys[..., slots[1], :] * keys[..., slots[3], :]).sum(-1)
    assert torch.allclose(score[..., slots[1]], wanted, atol=1e-5)


def test_one_frame_goes_by_values_alone():
    kv = video(9)
    assert torch.equal(InfiniPotV().score(kv), InfiniPotV().second_score(kv, kv.values.norm(dim=-1)))
    masks = winners([kv], InfiniPotV(), CacheConfig(Budget(6.0)), torch.tensor([6, 6]))
    assert masks is not None
    assert (masks[0][~kv.visual]).all()


def test_the_budget_is_text_then_what_changed_then_large_values():
    """12 entries: 6 of text count in the first half, so none of it is left for TaR; 24: 12 are, the recent one first."""
    sizes = [4] * 4
    kv, slots = video(*sizes, layer=3), patch_slots(*sizes)
    policy, norms = InfiniPotV(), kv.values.norm(dim=-1)
    score = policy.score(kv)
    for budget, changed in ((12, 0), (16, 2), (18, 3)):
        masks = winners([kv], policy, CacheConfig(Budget(float(budget))), torch.tensor([budget] * ROWS))
        assert masks is not None
        for row in range(ROWS):
            for head in range(HEADS):
                kept = set(masks[0, row, head].nonzero().flatten().tolist())
                text = set((~kv.visual[row, head]).nonzero().flatten().tolist())
                order = sorted(
                    [j for own in slots for j in own], key=lambda j: (float(score[row, head, j]), j), reverse=True
                )
                tar = set(order[:changed])
                rest = sorted(set(order) - tar, key=lambda j: float(norms[row, head, j]), reverse=True)
                assert tar <= set(slots[3])
                assert kept == text | tar | set(rest[: budget - len(text) - changed])


def test_tar_ratio_is_the_first_share():
    assert InfiniPotV.first_share == InfiniPotV().first_share == 0.5
    assert InfiniPotV(tar_ratio=0.2).first_share == 0.2
    assert InfiniPotV().first_share == 0.5


def test_holes_and_padding_do_not_change_scores():
    kv = video(9, 9, 9)
    wide, slots = with_holes(kv, 2, 2, at=5)
    wide = replace(wide, layers=4)
    for layer in range(4):
        a, b = (InfiniPotV().second_score(replace(x, layer=layer), x.values.norm(dim=-1)) for x in (wide, kv))
        assert torch.allclose(a[:, :, slots], b, atol=1e-5)
    assert torch.allclose(InfiniPotV().score(wide)[:, :, slots], InfiniPotV().score(kv), atol=1e-5)


def test_frames_stay_what_they_were_when_patches_left():
    """Told which positions were visual, an entry knows its place whatever is held around it."""
    kv = video(9, 9, 9)
    score, norms = InfiniPotV().score(kv), kv.values.norm(dim=-1)
    chosen = torch.tensor([0, 3, 5, 12, 13, 15, *range(22, 31)])
    entries = kv.keys[:, :, chosen], kv.values[:, :, chosen]
    picked = {name: getattr(kv, name)[:, :, chosen] for name in ("positions", "valid", "visual", "protected")}
    part = replace(kv, log_beta=None, load=lambda: entries, looked=lambda: kv.visual[:, 0], **picked)
    assert torch.allclose(InfiniPotV().score(part), score[:, :, chosen], atol=1e-5)
    held = torch.isin(torch.arange(kv.valid.shape[-1]), chosen) & kv.visual
    truth = naive_pooled(norms, held, *parts(kv), KERNELS[0])[:, :, chosen]
    assert torch.allclose(InfiniPotV().second_score(part, score[:, :, chosen]), truth, atol=1e-5)


def test_recent_frames_are_at_least_one():
    kv, slots = video(4, 4, 4), patch_slots(4, 4, 4)
    for policy in (InfiniPotV(recent_frames=0.0), InfiniPotV()):
        assert [bool((policy.score(kv)[..., own] == 2).all()) for own in slots] == [False, False, True]
    both = InfiniPotV(recent_frames=0.7).score(kv)
    assert [bool((both[..., own] == 2).all()) for own in slots] == [False, True, True]


@pytest.mark.parametrize("values", [{"tar_ratio": 1.5}, {"tar_ratio": -0.1}, {"recent_frames": 2.0}])
def test_impossible_settings_are_refused(values):
    with pytest.raises(ValueError, match=f"infinipot_v.{next(iter(values))} between 0 and 1"):
        InfiniPotV(**values)


def prompts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three images in each of two rows, the second one shorter by four tokens of text."""
    ids, mask = left_padded(tokens(2, 8 + 3 * (IMAGE_TOKENS + 2), seed=3), [26, 22])
    for image in range(3):
        start = 9 + image * (IMAGE_TOKENS + 2)
        ids[:, start : start + IMAGE_TOKENS] = IMAGE_TOKEN
    pixels = torch.randn(6, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    return ids, mask, pixels


@pytest.mark.parametrize("config", [{}, {"chunk_by_image": True}, {"evict_every": 2}])
def test_a_padded_batch_of_several_images_equals_its_rows(config):
    model, (ids, mask, pixels) = model_of("llava"), prompts()
    options = CacheConfig(Budget(17.0), **config)
    results = []
    for rows in (slice(0, 2), slice(0, 1), slice(1, 2)):
        real = mask[rows].any(0)
        with evicting(model, InfiniPotV(), options) as cache:
            told = Conversation(model, cache)
            told.feed(
                ids[rows][:, real],
                mask[rows][:, real],
                pixel_values=pixels.view(2, 3, *pixels.shape[1:])[rows].flatten(0, 1),
            )
            table = cache.kept_table()
            steps = [told.feed(tokens(2, 1, seed=s)[rows]) for s in range(4)]
            assert cache.kept().sum((0, 2)).tolist() == [6 * (17 if "evict_every" in config else 21)] * len(
                real[None].expand(cache.kept().shape[1], -1)
            )
        results.append((table, torch.cat(steps, 1)))
    for row in range(2):
        table, steps = results[row + 1]
        assert torch.equal(results[0][0][:, row, :, : table.shape[-1]], table[:, 0])
        assert gap(results[0][1][row], steps[0]) < 1e-5


def test_it_tells_layers_by_their_depth():
    """The model's own states say how deep they are."""
    model = tiny_llava(num_hidden_layers=4)
    ids, mask, pixels = prompts()
    with evicting(model, InfiniPotV()) as cache, cache.hold():
        Conversation(model, cache).feed(ids, mask, pixel_values=pixels)
        for number, layer in enumerate(cache.evicting_layers):
            kv = layer.state()
            assert (kv.layer, kv.layers) == (number, 4)
            frame, place, size = InfiniPotV()._frames(kv)
            truth = naive_pooled(kv.values.norm(dim=-1), kv.valid & kv.visual, frame, place, size, KERNELS[number])
            assert torch.allclose(InfiniPotV().second_score(kv, truth)[kv.valid], truth[kv.valid], atol=1e-5)
