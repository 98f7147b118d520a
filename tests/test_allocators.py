"""How allocators split budgets over layers, heads and modalities."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retention.budget import (
    ALLOCATORS,
    AllocationInput,
    LayerPool,
    Pool,
    Split,
    global_pool,
    head_adaptive,
    layer_shares,
    modality,
    pyramid,
    quota,
    uniform,
    weighted,
)

WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0, 0.1])


def available(values):
    return AllocationInput(torch.tensor(values))


def test_uniform_gives_the_budget_to_every_head_that_has_as_many():
    found = uniform(torch.tensor([4, 2]), available([[[9, 3], [9, 1]], [[4, 0], [2, 9]]]))
    assert found.tolist() == [[[4, 3], [2, 1]], [[4, 0], [2, 2]]]


def test_global_pool_is_the_budget_times_all_heads_at_most_what_is_there():
    found = global_pool(torch.tensor([2, 5]), available([[[9, 3], [5, 1]], [[4, 0], [2, 1]]]))
    assert isinstance(found, Pool)
    assert found.totals.tolist() == [8, 9]


def test_quota_splits_the_pool_by_the_table():
    given = available([[[9, 9], [9, 9]], [[9, 9], [9, 1]]])
    given.quota = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    found = quota(torch.tensor([2, 1]), given)
    assert found.tolist() == [[[2, 4], [1, 2]], [[0, 2], [0, 1]]]
    assert found.sum((0, 2)).tolist() == [8, 4]


def test_quota_hands_on_what_a_short_head_cannot_hold():
    given = available([[[3, 9]]])
    given.quota = torch.tensor([[0.9, 0.1]])
    assert quota(torch.tensor([5]), given).tolist() == [[[3, 7]]]


def test_quota_without_a_table_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match=r"needs a table.*cache\.quota"):
        quota(torch.tensor([5]), available([[[3, 9]]]))


def test_a_quota_table_of_another_shape_is_refused():
    given = available([[[3, 9]], [[3, 9]]])
    given.quota = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"expected cache\.quota for 2 layers x 2 heads, got 3 x 2"):
        quota(torch.tensor([5]), given)


def steps(budget, layers, tokens, **options):
    """Counts of one sequence and one head by layer."""
    given = AllocationInput(torch.full((layers, 1, 1), tokens), **options)
    return pyramid(torch.tensor([budget]), given).flatten().tolist()


def test_pyramid_falls_linearly_from_the_first_layer_to_the_last():
    assert steps(100, 5, 1000) == [195, 148, 100, 52, 5]  # 195, 147.5, 100, 52.5, 5; a tie goes to the lower layer
    assert steps(100, 5, 1000, pyramid_beta=2.0) == [150, 125, 100, 75, 50]
    assert steps(100, 5, 1000, pyramid_beta=1.0) == [100] * 5


def test_pyramid_gives_every_layer_its_window_and_shares_the_rest():
    assert steps(100, 5, 1000, window=torch.tensor([20]), pyramid_beta=2.0) == [140, 120, 100, 80, 60]
    assert steps(10, 3, 1000, window=torch.tensor([10])) == [10, 10, 10]
    assert steps(10, 3, 1000, window=torch.tensor([30])) == [10, 10, 10]


def test_pyramid_whose_first_layer_holds_everything_is_flatter():
    assert steps(100, 5, 150, window=torch.tensor([20]), pyramid_beta=2.0) == [140, 120, 100, 80, 60]
    assert steps(100, 5, 130, window=torch.tensor([20]), pyramid_beta=2.0) == [130, 115, 100, 85, 70]
    assert steps(100, 5, 100, window=torch.tensor([20])) == [100] * 5
    assert steps(100, 5, 60) == [60] * 5


def test_pyramid_hands_on_what_a_short_layer_cannot_hold():
    given = AllocationInput(torch.tensor([40, 1000, 1000, 1000, 1000])[:, None, None])
    assert pyramid(torch.tensor([100]), given).flatten().tolist() == [40, 222, 151, 79, 8]


def test_a_pyramid_of_whole_numbers_is_the_published_one():
    """`lo = floor(b / beta)`, `hi = 2 b - lo`, at most what is there, and steps of `floor((hi - lo) / (L - 1))`."""
    for budget, layers, length, window, beta in ((100, 5, 1000, 20, 20), (37, 4, 1000, 3, 7), (100, 5, 130, 20, 2)):
        b = budget - window
        low = b // beta
        high = 2 * b - low
        if high > length - window:
            high = length - window
            low = 2 * b - high
        step = (high - low) // (layers - 1)
        expected = [window + high - layer * step for layer in range(layers)]
        options = {"window": torch.tensor([window]), "pyramid_beta": float(beta)}
        assert steps(budget, layers, length, **options, integer_floor=True) == expected
        assert sum(steps(budget, layers, length, **options)) == budget * layers
    assert sum(steps(100, 6, 1000, window=torch.tensor([20]), integer_floor=True)) != 100 * 6


def test_pyramid_of_one_layer_is_the_budget():
    assert steps(100, 1, 1000) == [100]


def test_pyramid_has_its_own_slope_in_every_sequence():
    given = AllocationInput(torch.full((3, 2, 2), 99), window=torch.tensor([0, 4]), pyramid_beta=2.0)
    assert pyramid(torch.tensor([8, 8]), given)[:, :, 1].tolist() == [[12, 10], [8, 8], [4, 6]]


def test_layers_follow_their_weights_alike_in_all_heads():
    given = AllocationInput(torch.full((3, 2, 2), 99), layer_weights=torch.tensor([3.0, 2.0, 1.0]))
    assert layer_shares(torch.tensor([8, 4]), given).tolist() == [
        [[12, 12], [6, 6]],
        [[8, 8], [4, 4]],
        [[4, 4], [2, 2]],
    ]


def test_layers_hand_on_what_a_short_layer_cannot_hold():
    given = AllocationInput(torch.tensor([[[2]], [[99]], [[99]]]), layer_weights=torch.tensor([3.0, 2.0, 1.0]))
    assert layer_shares(torch.tensor([8]), given).flatten().tolist() == [2, 15, 7]


@pytest.mark.parametrize(("weights", "got"), [(None, "none"), (torch.ones(2), "2")])
def test_layers_without_a_weight_for_each_are_refused(weights, got):
    given = AllocationInput(torch.full((3, 1, 1), 9), layer_weights=weights)
    with pytest.raises(ValueError, match=rf"needs 3 weights, one per layer, got {got}; set cache\.layer_weights"):
        layer_shares(torch.tensor([5]), given)


def halves(budget, present, visual, share=None):
    """Visual and text counts of heads with `present` entries, `visual` of them visual."""
    shape = torch.tensor([[present]])
    given = AllocationInput(shape, available_visual=torch.tensor([[visual]]), visual_share=share)
    found = modality(torch.tensor([budget]), given)
    assert isinstance(found, Split)
    return list(zip(found.visual.flatten().tolist(), found.text.flatten().tolist(), strict=True))


def test_modality_follows_what_is_there_and_rounds_to_the_nearest():
    assert halves(10, [100, 100, 100, 100], [0, 34, 35, 100]) == [(0, 10), (3, 7), (4, 6), (10, 0)]


def test_modality_follows_its_share():
    assert halves(10, [100], [50], 0.3) == [(3, 7)]
    assert halves(5, [100], [50], 0.5) == [(3, 2)]
    assert halves(10, [100], [50], 0.0) == [(0, 10)]
    assert halves(10, [100], [50], 1.0) == [(10, 0)]


def test_modality_hands_on_what_one_kind_cannot_fill():
    assert halves(10, [100, 100], [2, 97], 0.5) == [(2, 8), (7, 3)]
    assert halves(10, [100], [0], 1.0) == [(0, 10)]


def test_modality_of_a_short_or_empty_head_is_everything_it_has():
    assert halves(10, [7, 0], [3, 0]) == [(3, 4), (0, 0)]
    assert halves(10, [7, 0], [3, 0], 0.9) == [(3, 4), (0, 0)]


@st.composite
def caches(draw):
    """Budgets and everything allocators may know of up to 4 layers, 3 sequences and 3 heads of uneven lengths."""
    sizes = layers, batch, kv_heads = tuple(draw(st.integers(1, n)) for n in (4, 3, 3))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    there = torch.randint(0, draw(st.sampled_from([1, 8, 40])), sizes, generator=g)
    given = AllocationInput(
        there,
        quota=torch.rand(layers, kv_heads, generator=g).round(decimals=1),
        layer_weights=torch.rand(layers, generator=g).round(decimals=1),
        window=torch.randint(0, 6, (batch,), generator=g),
        pyramid_beta=draw(st.sampled_from([1.0, 2.0, 20.0])),
        available_visual=(torch.rand(sizes, generator=g) * (there + 1)).long(),
        visual_share=draw(st.sampled_from([None, 0.0, 0.3, 1.0])),
        head_floor=draw(st.sampled_from([0.0, 0.2, 1.0])),
        weights=WEIGHTS[:layers, None].expand(-1, batch),
    )
    return torch.randint(1, 30, (batch,), generator=g), given


@pytest.mark.parametrize("name", ALLOCATORS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(drawn=caches())
def test_every_allocator_gives_out_exactly_the_budget_and_nothing_that_is_not_there(name, drawn):
    budget, given = drawn
    layers, _, kv_heads = given.available.shape
    found = ALLOCATORS[name](budget, given)
    everything = torch.minimum(budget * layers * kv_heads, given.available.sum((0, 2)))
    if isinstance(found, Pool):
        assert torch.equal(found.totals, everything)
        return
    if isinstance(found, LayerPool):
        room = given.available.sum(2)
        assert torch.equal(found.totals, torch.minimum(budget * kv_heads, room))
        assert (found.floors.sum(2) <= found.totals).all()
        return
    if isinstance(found, Split):
        visual, text = given.available_visual, given.available - given.available_visual
        assert ((found.visual >= 0) & (found.visual <= visual) & (found.text >= 0) & (found.text <= text)).all()
        found = found.visual + found.text
    assert ((found >= 0) & (found <= given.available)).all()
    if name == "uniform":
        everything = torch.minimum(budget[:, None], given.available).sum((0, 2))
    assert torch.equal(found.sum((0, 2)), everything)


@pytest.mark.parametrize("name", ["pyramid", "layers"])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(drawn=caches())
def test_heads_that_can_hold_their_layers_budgets_do(name, drawn):
    budget, given = drawn
    layers = len(given.available)
    found, share = ALLOCATORS[name](budget, given).sum(0), budget[:, None] * layers
    assert (found >= torch.minimum(share, given.available.sum(0))).all()
    enough = (given.available.sum(0) >= share).all(1)
    assert torch.equal(found[enough], share.expand_as(found)[enough])


@pytest.mark.parametrize("name", ALLOCATORS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(drawn=caches())
def test_a_sequence_gets_the_same_alone_as_in_a_batch(name, drawn):
    budget, given = drawn
    whole = ALLOCATORS[name](budget, given)
    found = None if isinstance(whole, torch.Tensor) else vars(whole)
    for row in range(len(budget)):
        one = slice(row, row + 1)
        own = replace(
            given,
            available=given.available[:, one],
            window=given.window[one],
            available_visual=given.available_visual[:, one],
            weights=given.weights[:, one],
        )
        alone = ALLOCATORS[name](budget[one], own)
        if found is None:
            assert torch.equal(alone, ALLOCATORS[name](budget, given)[:, one])
        else:
            assert all(
                torch.equal(x, found[k][one] if x.ndim == 1 else found[k][:, one]) for k, x in vars(alone).items()
            )


def test_weights_of_the_policy_split_the_budget_over_layers():
    given = AllocationInput(torch.full((3, 2, 2), 99), weights=torch.tensor([[3.0, 1], [2.0, 1], [1.0, 1]]))
    found = weighted(torch.tensor([8, 4]), given)
    assert found[:, 0, 0].tolist() == [12, 8, 4]
    assert found[:, 1, 1].tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="a policy that weighs layers"):
        weighted(torch.tensor([8, 4]), replace(given, weights=None))


def test_a_floor_for_layers_that_weigh_little():
    given = AllocationInput(torch.full((3, 1, 2), 99), weights=torch.tensor([[5.0], [1.0], [0.0]]), least=3)
    assert weighted(torch.tensor([8]), given)[:, 0, 0].tolist() == [18, 3, 3]
    assert weighted(torch.tensor([2]), given)[:, 0, 0].tolist() == [2, 2, 2], "no more than equal parts"


def test_what_a_full_layer_cannot_take_goes_to_the_others_or_is_lost():
    given = AllocationInput(torch.full((3, 1, 2), 9), weights=torch.tensor([[4.0], [1.0], [1.0]]))
    assert weighted(torch.tensor([6]), given)[:, 0, 1].tolist() == [9, 5, 4]
    assert weighted(torch.tensor([6]), replace(given, redistributes=False))[:, 0, 1].tolist() == [9, 3, 3]


def test_a_layers_pool_is_its_heads_budgets_above_a_floor():
    found = head_adaptive(torch.tensor([10]), AllocationInput(torch.tensor([[[99, 1]], [[3, 4]]])))
    assert found.totals.tolist() == [[20], [7]]
    assert found.floors.tolist() == [[[2, 1]], [[2, 2]]]


def test_allocators_are_named():
    expected = {
        "uniform": uniform,
        "global": global_pool,
        "quota": quota,
        "pyramid": pyramid,
        "layers": layer_shares,
        "modality": modality,
        "weighted": weighted,
        "head_adaptive": head_adaptive,
    }
    assert expected == ALLOCATORS
