"""Selection against a brute-force sort: order, protection, tiers, ties."""

from dataclasses import replace

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from retention.ops import select
from retention.ops.select import (
    Ranking,
    keep_by_modality,
    keep_global,
    keep_per_head,
    keep_per_layer,
    keep_threshold,
)


def ranking(scores, *, positions=None, valid=None, protected=None, tiers=None):
    """From nested lists [layers][kv_heads][keys] of one sequence."""

    def tensor(values, kind):
        return torch.tensor(values, dtype=kind).unsqueeze(1)

    scores = tensor(scores, torch.float32)
    yes, no = torch.ones_like(scores, dtype=torch.bool), torch.zeros_like(scores, dtype=torch.bool)
    return Ranking(
        scores,
        torch.arange(scores.shape[-1]).expand(scores.shape) if positions is None else tensor(positions, torch.long),
        yes if valid is None else tensor(valid, torch.bool),
        no if protected is None else tensor(protected, torch.bool),
        None if tiers is None else tensor(tiers, torch.long),
    )


def counts(values):
    return torch.tensor(values).unsqueeze(1)


def kept(mask):
    """Kept indices as nested lists [layers][kv_heads]."""
    return [[head.nonzero().flatten().tolist() for head in layer] for layer in mask[:, 0]]


def brute_force(ranked, batch, cells, count):
    """Set of (layer, head, index) kept: Python's own sort over the entries of `cells` [(layer, head), ...]."""
    tiers = torch.zeros_like(ranked.positions) if ranked.tiers is None else ranked.tiers
    entries = [
        (
            bool(ranked.protected[layer, batch, head, i]),
            int(tiers[layer, batch, head, i]),
            float(ranked.scores[layer, batch, head, i]),
            int(ranked.positions[layer, batch, head, i]),
            -layer,
            -head,
            i,
        )
        for layer, head in cells
        for i in range(ranked.scores.shape[-1])
        if ranked.valid[layer, batch, head, i]
    ]
    best = sorted(entries, reverse=True)[:count]
    return {(-layer, -head, i) for *_, layer, head, i in best}


def as_set(mask, batch):
    return {(layer, head, i) for layer, head, i in mask[:, batch].nonzero().tolist()}


@st.composite
def rankings(draw, most=1):
    layers, batch, kv_heads, keys = (draw(st.integers(1, n)) for n in (3, 2, 3, 6))
    keys *= draw(st.sampled_from([1, 1, most]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (layers, batch, kv_heads, keys)
    positions = torch.rand(*shape[:-1], keys + 3, generator=g).argsort(-1)[..., :keys].sort(-1).values
    scores = torch.randint(-2, draw(st.integers(-1, 4)), shape, generator=g).float() / 2
    scores *= torch.randint(0, 2, shape, generator=g) * 2 - 1  # zeros of both signs
    valid = torch.rand(shape, generator=g) < draw(st.sampled_from([0.3, 0.8, 1.0]))
    protected = torch.rand(shape, generator=g) < draw(st.sampled_from([0.0, 0.3]))
    tiers = torch.randint(0, 3, shape, generator=g) if draw(st.booleans()) else None
    scores[~valid] = draw(st.sampled_from([0.0, 9.0, float("nan"), float("inf")]))
    return Ranking(scores, positions, valid, protected, tiers), g


def naive_best(ranked, counts, rows):
    """The `counts` best of each row by three stable sorts: position, then score, then class."""
    tiers = torch.zeros_like(ranked.positions) if ranked.tiers is None else ranked.tiers
    classes = torch.where(ranked.protected, tiers.amax() + 1, tiers).masked_fill(~ranked.valid, tiers.amin() - 1)
    parts = (ranked.positions, ranked.scores.masked_fill(~ranked.valid, 0.0), classes, ranked.valid)
    positions, scores, classes, valid = (rearrange(x, f"layers batch kv_heads keys -> {rows}") for x in parts)
    order = positions.argsort(dim=-1, descending=True, stable=True)
    for key in (scores, classes):
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    chosen = torch.arange(order.shape[-1]) < counts.flatten()[:, None]
    kept = torch.zeros_like(valid).scatter(-1, order, chosen) & valid
    sizes = dict(zip(("layers", "batch", "kv_heads"), ranked.valid.shape, strict=False))
    return rearrange(kept, f"{rows} -> layers batch kv_heads keys", **sizes)


@pytest.mark.parametrize("many", [0, 256])
@pytest.mark.parametrize("rows", [select._HEADS, select._POOL])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(drawn=rankings(most=40))
def test_the_cut_equals_three_sorts_for_every_count(rows, many, drawn):
    """Whichever way the cut is found, from what is protected to more than there is."""
    ranked, g = drawn
    room, needed = (
        rearrange(x, f"layers batch kv_heads keys -> {rows}").sum(-1) for x in (ranked.valid, ranked.protected)
    )
    counts = torch.maximum((torch.rand(room.shape, generator=g) * (room + 3)).long() - 1, needed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "_MANY", many)
        assert torch.equal(select._best(ranked, counts, rows), naive_best(ranked, counts, rows))


@pytest.mark.parametrize("size", [883, 5000])
@pytest.mark.parametrize("values", [3, 50, 10**6])
def test_the_cut_equals_three_sorts_on_long_rows(size, values):
    g = torch.Generator().manual_seed(values)
    shape = (2, 3, 2, size)
    scores = torch.randint(0, values, shape, generator=g).float()
    tiers, yes = torch.randint(-1, 2, shape, generator=g), torch.rand(shape, generator=g)
    ranked = Ranking(scores, torch.arange(size).expand(shape), yes < 0.9, yes < 0.05, tiers)
    totals = torch.tensor([size // 4, size, 3 * size])
    assert torch.equal(select._best(ranked, totals, select._POOL), naive_best(ranked, totals, select._POOL))
    counts = torch.randint(size // 10, size, shape[:3], generator=g)
    assert torch.equal(select._best(ranked, counts, select._HEADS), naive_best(ranked, counts, select._HEADS))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rankings())
def test_keep_per_head_is_a_sort_of_each_head(drawn):
    ranked, g = drawn
    room = ranked.valid.sum(-1)
    needed = ranked.protected.sum(-1)
    want = needed + (torch.rand(needed.shape, generator=g) * (room - needed + 2)).long()
    mask = keep_per_head(ranked, want)
    layers, batch, kv_heads, _ = mask.shape
    for row in range(batch):
        for layer in range(layers):
            for head in range(kv_heads):
                expected = brute_force(ranked, row, [(layer, head)], int(want[layer, row, head]))
                assert {x for x in as_set(mask, row) if x[:2] == (layer, head)} == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rankings())
def test_keep_global_is_a_sort_of_the_whole_sequence(drawn):
    ranked, g = drawn
    room, needed = (x.sum((0, 2, 3)) for x in (ranked.valid, ranked.protected))
    totals = needed + (torch.rand(needed.shape, generator=g) * (room - needed + 2)).long()
    mask = keep_global(ranked, totals)
    layers, batch, kv_heads, _ = mask.shape
    for row in range(batch):
        cells = [(layer, head) for layer in range(layers) for head in range(kv_heads)]
        assert as_set(mask, row) == brute_force(ranked, row, cells, int(totals[row]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rankings(), st.integers(1, 3))
def test_a_floor_per_head_keeps_each_heads_best_and_then_sorts(drawn, floor):
    ranked, g = drawn
    layers, batch, kv_heads, _ = ranked.scores.shape
    cells = [(layer, head) for layer in range(layers) for head in range(kv_heads)]
    held = torch.zeros_like(ranked.valid)
    for row in range(batch):
        for cell in cells:
            for layer, head, i in brute_force(ranked, row, [cell], floor):
                held[layer, row, head, i] = True
    raised = Ranking(ranked.scores, ranked.positions, ranked.valid, held | ranked.protected, ranked.tiers)
    room, needed = (x.sum((0, 2, 3)) for x in (raised.valid, raised.protected))
    totals = needed + (torch.rand(needed.shape, generator=g) * (room - needed + 1)).long()
    mask = keep_global(ranked, totals, min_per_head=floor)
    for row in range(batch):
        assert as_set(mask, row) == brute_force(raised, row, cells, int(totals[row]))


def test_each_head_keeps_its_count():
    g = torch.Generator().manual_seed(0)
    ranked = ranking(torch.randn(2, 3, 8, generator=g).tolist())
    want = [[0, 3, 8], [1, 5, 20]]
    assert keep_per_head(ranked, counts(want)).sum(-1)[:, 0].tolist() == [[0, 3, 8], [1, 5, 8]]


def test_the_pool_keeps_its_total_wherever_the_scores_are():
    ranked = ranking([[[9, 8, 7], [0, 0, 0]], [[1, 5, 1], [6, 1, 1]]])
    assert kept(keep_global(ranked, torch.tensor([5]))) == [[[0, 1, 2], []], [[1], [0]]]


def test_each_sequence_has_its_own_total():
    scores = torch.randn(2, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    none = torch.zeros_like(scores, dtype=torch.bool)
    ranked = Ranking(scores, torch.arange(5).expand(scores.shape), ~none, none)
    totals = torch.tensor([4, 0, 17])
    assert torch.equal(keep_global(ranked, totals).sum((0, 2, 3)), totals)


def test_protected_entries_stay_within_the_budget_whatever_their_score():
    ranked = ranking([[[-9, 5, 4, 3, -8]]], protected=[[[1, 0, 0, 0, 1]]])
    assert kept(keep_per_head(ranked, counts([[3]]))) == [[[0, 1, 4]]]
    assert kept(keep_global(ranked, torch.tensor([2]))) == [[[0, 4]]]


@pytest.mark.parametrize(
    "choose", [lambda r: keep_per_head(r, counts([[1]])), lambda r: keep_global(r, torch.tensor([1]))]
)
def test_more_protected_than_budget_is_refused_with_both_numbers(choose):
    ranked = ranking([[[1, 2, 3, 4]]], protected=[[[1, 1, 0, 1]]])
    with pytest.raises(ValueError, match=r"3 protected, budget for 1; raise the budget") as caught:
        choose(ranked)
    for way in ("sink_size", "recent_size", "min_per_head", "protect_text", "mask"):
        assert way in str(caught.value)


def test_a_floor_per_head_beyond_the_total_is_refused():
    with pytest.raises(ValueError, match="4 protected, budget for 3"):
        keep_global(ranking([[[1, 2], [3, 4]]]), torch.tensor([3]), min_per_head=2)


def test_a_floor_per_head_keeps_the_best_of_a_losing_head():
    ranked = ranking([[[9, 8, 7, 6], [1, 3, 2, 0]]])
    assert kept(keep_global(ranked, torch.tensor([3]))) == [[[0, 1, 2], []]]
    assert kept(keep_global(ranked, torch.tensor([3]), min_per_head=1)) == [[[0, 1], [1]]]


def test_protected_padding_needs_no_budget():
    ranked = ranking([[[1, 2, 3]]], valid=[[[0, 0, 1]]], protected=[[[1, 1, 1]]])
    assert kept(keep_per_head(ranked, counts([[1]]))) == [[[2]]]


def test_equal_scores_keep_the_larger_position():
    ranked = ranking([[[1, 1, 1, 1]]], positions=[[[7, 2, 9, 4]]])
    assert kept(keep_per_head(ranked, counts([[2]]))) == [[[0, 2]]]


def test_equal_scores_and_positions_keep_the_lower_layer_then_the_lower_head():
    ranked = ranking([[[1, 1], [1, 1]], [[1, 1], [1, 1]]])
    assert kept(keep_global(ranked, torch.tensor([1]))) == [[[1], []], [[], []]]
    assert kept(keep_global(ranked, torch.tensor([2]))) == [[[1], [1]], [[], []]]
    assert kept(keep_global(ranked, torch.tensor([3]))) == [[[1], [1]], [[1], []]]
    assert kept(keep_global(ranked, torch.tensor([5]))) == [[[0, 1], [1]], [[1], [1]]]


def test_negative_zero_ties_with_zero():
    assert kept(keep_per_head(ranking([[[0.0, -0.0]]]), counts([[1]]))) == [[[1]]]


def test_a_tier_outranks_any_score():
    ranked = ranking([[[1e30, 0.0, -1e30]]], tiers=[[[0, 0, 1]]])
    assert kept(keep_per_head(ranked, counts([[1]]))) == [[[2]]]


def test_tiers_leave_tiny_differences_of_large_scores_in_order():
    close = [1.0 + 2**-23, 1.0]
    ranked = ranking([[[*close, -5.0]]], tiers=[[[1_000_000, 1_000_000, 0]]])
    assert kept(keep_per_head(ranked, counts([[1]]))) == [[[0]]]


def test_protection_outranks_every_tier():
    ranked = ranking([[[0, 5, 5]]], tiers=[[[0, 7, 7]]], protected=[[[1, 0, 0]]])
    assert kept(keep_per_head(ranked, counts([[1]]))) == [[[0]]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match=r"finite scores.*NaN or inf"):
        ranking([[[1.0, bad]]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_scores_of_invalid_entries_are_never_looked_at(bad):
    ranked = ranking([[[bad, 1.0, 2.0]]], valid=[[[0, 1, 1]]], tiers=[[[5, 0, 0]]])
    assert kept(keep_per_head(ranked, counts([[3]]))) == [[[1, 2]]]
    assert kept(keep_global(ranked, torch.tensor([1]))) == [[[2]]]
    assert kept(keep_threshold(ranked, 0.0)) == [[[1, 2]]]


def test_a_head_without_entries_keeps_nothing_and_disturbs_no_other():
    ranked = ranking([[[1, 2], [3, 4]]], valid=[[[0, 0], [1, 1]]])
    assert kept(keep_per_head(ranked, counts([[2, 1]]))) == [[[], [1]]]
    assert kept(keep_global(ranked, torch.tensor([3]), min_per_head=1)) == [[[], [0, 1]]]
    assert kept(keep_per_head(ranking([[[1, 2]]], valid=[[[0, 0]]]), counts([[2]]))) == [[[]]]


def test_heads_of_length_zero_keep_nothing():
    ranked = ranking([[[], []]])
    assert keep_per_head(ranked, counts([[2, 2]])).shape == (1, 1, 2, 0)
    assert keep_global(ranked, torch.tensor([3])).shape == (1, 1, 2, 0)


def test_one_set_per_layer_is_ranked_by_the_mean_over_heads():
    ranked = ranking([[[9, 0, 4, 0], [0, 5, 3, 0]]])
    assert kept(keep_per_layer(ranked, counts([[2, 2]]))) == [[[0, 2], [0, 2]]]


def test_one_set_per_layer_refuses_heads_of_different_content():
    ranked = ranking([[[1, 2], [1, 2]]], positions=[[[0, 1], [0, 2]]])
    with pytest.raises(ValueError, match=r"selector 'layer'.*use selector 'head'"):
        keep_per_layer(ranked, counts([[1, 1]]))


def test_one_set_per_layer_ignores_what_lies_in_holes():
    ranked = ranking([[[1, 2, 9], [3, 4, 9]]], positions=[[[0, 5, 7], [0, 5, 8]]], valid=[[[1, 1, 0], [1, 1, 0]]])
    assert kept(keep_per_layer(ranked, counts([[1, 1]]))) == [[[1], [1]]]
    ranked = ranking([[[1, 2], [3, 4]]], valid=[[[1, 1], [1, 0]]])
    with pytest.raises(ValueError, match="selector 'layer'"):
        keep_per_layer(ranked, counts([[1, 1]]))


def test_threshold_keeps_what_reaches_it_and_what_is_protected():
    ranked = ranking([[[0.4, 0.5, 0.6, 0.1, 0.9]]], protected=[[[0, 0, 0, 1, 0]]], valid=[[[1, 1, 1, 1, 0]]])
    assert kept(keep_threshold(ranked, 0.5)) == [[[1, 2, 3]]]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rankings(), st.floats(0, 1))
def test_by_modality_each_kind_is_a_sort_of_its_own(drawn, share):
    ranked, g = drawn
    visual = torch.rand(ranked.valid.shape, generator=g) < share
    there, needed = (x.sum(-1) for x in (ranked.valid & visual, ranked.protected & visual))
    others, wanted = (x.sum(-1) for x in (ranked.valid & ~visual, ranked.protected & ~visual))
    first = needed + (torch.rand(needed.shape, generator=g) * (there - needed + 1)).long()
    second = wanted + (torch.rand(wanted.shape, generator=g) * (others - wanted + 1)).long()
    mask = keep_by_modality(ranked, visual, first, second)
    for own, counts in ((visual, first), (~visual, second)):
        expected = naive_best(replace(ranked, valid=ranked.valid & own), counts, select._HEADS)
        assert torch.equal(mask & own, expected)


VISUAL = torch.tensor([[[[1, 1, 1, 0, 0, 0]]]], dtype=torch.bool)


def test_by_modality_worse_visual_entries_stay_beside_better_text():
    ranked = ranking([[[1, 3, 2, 9, 8, 7]]])
    assert kept(keep_by_modality(ranked, VISUAL, counts([[2]]), counts([[1]]))) == [[[1, 2, 3]]]
    assert kept(keep_by_modality(ranked, VISUAL, counts([[0]]), counts([[2]]))) == [[[3, 4]]]


def test_by_modality_protected_entries_take_from_the_other_kind_within_the_total():
    ranked = ranking([[[1, 3, 2, 9, 8, 7]]], protected=[[[1, 0, 1, 0, 0, 1]]])
    assert kept(keep_by_modality(ranked, VISUAL, counts([[0]]), counts([[4]]))) == [[[0, 2, 3, 5]]]
    assert kept(keep_by_modality(ranked, VISUAL, counts([[3]]), counts([[0]]))) == [[[0, 2, 5]]]
    with pytest.raises(ValueError, match="3 protected, budget for 2"):
        keep_by_modality(ranked, VISUAL, counts([[1]]), counts([[1]]))


def test_by_modality_an_empty_head_keeps_nothing():
    ranked = ranking([[[1] * 6, [1] * 6]], valid=[[[0] * 6, [1] * 6]])
    visual = VISUAL.expand(1, 1, 2, 6)
    assert kept(keep_by_modality(ranked, visual, counts([[0, 1]]), counts([[0, 1]]))) == [[[], [2, 5]]]
