"""Allocators, protection and selectors brought together on hand-made states."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from retention import POLICIES, Budget, CacheConfig
from retention.policies.h2o import H2O
from retention.policies.knorm import Knorm
from tests.policies.test_matrix import EVICTING, HEADS, KEYS, ROWS, state, winners

LAYERS = 3
BUDGETS = torch.tensor([5, 4])


def states(count: int = LAYERS, visual: Any = None, protected: Any = None) -> list:
    """Layers whose entries at the given positions are visual, or protected."""

    def marks(positions: Any) -> torch.Tensor:
        return torch.isin(torch.arange(KEYS), torch.tensor(positions or [-1])).expand(ROWS, HEADS, KEYS).clone()

    return [replace(state(layer=n), visual=marks(visual), protected=marks(protected)) for n in range(count)]


def kept(name: str, layers: list, budgets: torch.Tensor = BUDGETS, **changes: Any) -> torch.Tensor:
    masks = winners(layers, POLICIES[name](), CacheConfig(Budget(5.0), **changes), budgets)
    assert masks is not None
    return masks


@pytest.mark.parametrize("name", EVICTING)
def test_a_pyramid_is_met_layer_by_layer(name):
    masks = kept(name, states(), allocator="pyramid", pyramid_beta=2.5)
    window = torch.tensor([POLICIES[name]().recent(n) for n in (5, 4)])
    assert masks.sum((0, 3)).tolist() == [[15] * HEADS, [12] * HEADS]
    first, last = (masks[layer, :, 0].sum(-1) for layer in (0, -1))
    slope = (BUDGETS - window) * (1 - 1 / 2.5)
    assert ((first - (BUDGETS + slope)).abs() <= 0.5).all()
    assert ((last - (BUDGETS - slope)).abs() <= 0.5).all()


def test_the_configured_window_is_part_of_every_layer_of_a_pyramid():
    masks = kept("knorm", states(), allocator="pyramid", recent_size=3, pyramid_beta=20.0)
    assert masks[..., -3:].all()
    assert masks[:, 0, 0].sum(-1).tolist() == [7, 5, 3]


def test_layer_weights_are_met():
    masks = kept("knorm", states(), allocator="layers", layer_weights=[2.0, 1.0, 0.0])
    assert masks[:, 0].sum(-1).tolist() == [[10] * HEADS, [5] * HEADS, [0] * HEADS]
    assert masks[:, 1].sum(-1).tolist() == [[8] * HEADS, [4] * HEADS, [0] * HEADS]


@pytest.mark.parametrize(("share", "counts"), [(None, [2, 1]), (0.8, [4, 3]), (0.0, [0, 0]), (1.0, [4, 4])])
@pytest.mark.parametrize("name", ["knorm", "db_trim_kv"])
def test_modality_keeps_the_best_of_each_kind(name, share, counts):
    """Four visual entries of twelve; a policy made for one pool is ranked inside each head."""
    layers, policy = states(visual=[1, 2, 5, 8]), POLICIES[name]()
    masks = kept(name, layers, allocator="modality", visual_share=share)
    for masked, layer in zip(masks, layers, strict=True):
        scores = policy.score(layer)
        for row in range(ROWS):
            total = int(BUDGETS[row])
            for kind, n in ((layer.visual, counts[row]), (~layer.visual, total - counts[row])):
                best = scores.masked_fill(~kind, -torch.inf)[row].topk(n).indices
                expected = torch.zeros(HEADS, KEYS, dtype=torch.bool).scatter(1, best, True)
                assert torch.equal(masked[row] & kind[row], expected)


def test_modality_brings_its_selector_unless_one_is_asked_for():
    class ByLayer(Knorm):
        selector = "layer"

    config = CacheConfig(Budget(5.0), allocator="modality")
    own, plain = (winners(states(visual=[3, 4]), policy, config, BUDGETS) for policy in (ByLayer(), Knorm()))
    assert own is not None
    assert plain is not None
    assert torch.equal(own, plain)


def test_padding_is_of_no_kind():
    layers = states(count=1, visual=range(KEYS))
    layers[0].valid[:, :, :4] = False
    layers[0].visual[:, :, 10:] = False
    masks = kept("knorm", layers, allocator="modality")
    assert masks[0, 0, :, 10:].sum(-1).tolist() == [1] * HEADS  # 5 * 2/8 = 1.25
    assert not masks[..., :4].any()


@pytest.mark.parametrize("selector", ["layer", "global", "threshold"])
def test_modality_refuses_other_selectors(selector):
    threshold = 0.5 if selector == "threshold" else None
    with pytest.raises(ValueError, match=rf"selector '{selector}' and allocator 'modality'.*use selector 'head'"):
        kept("knorm", states(), allocator="modality", selector=selector, threshold=threshold)


@pytest.mark.parametrize("name", ["pyramid", "layers", "modality"])
def test_nothing_over_budget_decides_nothing_and_scores_nothing(name):
    def score(kv: Any) -> Any:
        raise AssertionError("nothing needs a score")

    policy = Knorm()
    policy.score = score  # type: ignore[method-assign]
    config = CacheConfig(Budget(12.0), allocator=name, layer_weights=[1.0, 0.0, 0.0])
    assert winners(states(), policy, config, torch.tensor([12, 40])) is None


SCOPES = {
    "uniform": {"allocator": "uniform"},
    "layer": {"allocator": "uniform", "selector": "layer"},
    "global": {"allocator": "global"},
    "pyramid": {"allocator": "pyramid", "pyramid_beta": 2.0},
    "modality": {"allocator": "modality", "visual_share": 0.0},
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", EVICTING)
def test_protected_entries_stay_inside_the_budget(name, scope):
    marked = [3, 6]
    layers = states(visual=[3, 4], protected=marked)
    budgets = torch.tensor([8, 8])
    masks = kept(name, layers, budgets, **SCOPES[scope])
    assert masks[..., marked].all()
    assert masks.sum((0, 2, 3)).tolist() == [8 * LAYERS * HEADS] * ROWS
    free = kept(name, states(visual=[3, 4]), budgets, **SCOPES[scope])
    assert not free[..., marked].all()


def test_protection_adds_to_sinks_and_recent_entries():
    masks = kept("knorm", states(protected=[6]), sink_size=1, recent_size=2)
    assert masks[..., [0, 6, 10, 11]].all()
    assert masks.sum(-1).unique(dim=0).shape[0] == 1
    assert masks[:, 0].sum(-1).unique().tolist() == [5]


@pytest.mark.parametrize(("scope", "numbers"), [("uniform", "6 protected, budget for 5"), ("global", "54 .* 45")])
def test_more_protected_than_budget_is_one_sentence_with_all_the_ways_out(scope, numbers):
    with pytest.raises(ValueError, match=numbers) as caught:
        kept("knorm", states(protected=range(6)), **SCOPES[scope])
    for way in ("raise the budget", "sink_size", "recent_size", "protect_text", "your mask"):
        assert way in str(caught.value)


def test_protected_padding_is_no_burden():
    layers = states(count=1, protected=range(6))
    layers[0].valid[:, :, :5] = False
    assert kept("knorm", layers)[0, :, :, 5].all()


def test_the_recent_share_of_a_policy_follows_the_head():
    """H2O keeps half of what its head holds, also where heads hold different numbers."""
    policy = H2O()
    layers = states()
    for layer in layers:
        layer.statistics["column_sums"][..., -6:] = 0.0
    for name, options in (("pyramid", {"pyramid_beta": 2.0}), ("modality", {"visual_share": 0.0})):
        masks = winners(layers, policy, CacheConfig(Budget(6.0), allocator=name, **options), torch.tensor([6, 6]))
        assert masks is not None
        for count, mask in zip(masks.sum(-1).flatten().tolist(), masks.flatten(0, 2), strict=True):
            assert mask[KEYS - count // 2 :].all()
            assert not mask[KEYS - 6 : KEYS - count // 2].any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pyramid_beta": 0.5}, ("cache.pyramid_beta", "at least 1", "0.5")),
        ({"pyramid_beta": float("nan")}, ("cache.pyramid_beta", "nan")),
        ({"pyramid_beta": float("inf")}, ("cache.pyramid_beta", "inf")),
        ({"allocator": "layers"}, ("cache.layer_weights", "one number per layer", "None")),
        ({"layer_weights": [1.0, -1.0]}, ("cache.layer_weights", "0 or more", "-1.0")),
        ({"layer_weights": [0.0, 0.0]}, ("cache.layer_weights", "above 0", "[0.0, 0.0]")),
        ({"layer_weights": []}, ("cache.layer_weights", "above 0", "[]")),
        ({"layer_weights": [float("nan")]}, ("cache.layer_weights", "nan")),
        ({"visual_share": 1.5}, ("cache.visual_share", "between 0 and 1", "1.5")),
        ({"visual_share": -0.1}, ("cache.visual_share", "between 0 and 1", "-0.1")),
    ],
)
def test_impossible_options_are_named(changes, words):
    with pytest.raises(ValueError, match="expected cache") as caught:
        CacheConfig(**changes)
    assert [word for word in words if word not in str(caught.value)] == []


def test_options_at_their_bounds_are_accepted():
    for share in (0, 1, None):
        assert CacheConfig(visual_share=share, pyramid_beta=1).visual_share == share
    assert CacheConfig(allocator="layers", layer_weights=[0.0, 1.0]).layer_weights == [0.0, 1.0]
    assert not CacheConfig().protect_text
