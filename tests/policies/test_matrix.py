"""Every policy on hand-made states: what it prefers, that higher means keep, and that counts are met."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from retention import POLICIES, Budget, CacheConfig, KVState
from retention.cache.decide import decide
from retention.policies.db_trim_kv import DBTrimKV
from retention.policies.h2o import H2O
from retention.policies.keydiff import KeyDiff
from retention.policies.knorm import Knorm
from retention.policies.random import Random
from retention.policies.snapkv import SnapKV
from retention.policies.streaming_llm import StreamingLLM
from retention.policies.trim_kv import TrimKV

ROWS, HEADS, KEYS, WIDTH = 2, 3, 12, 8
CONFIGS = Path(__file__).parents[2] / "configs"
EVICTING = sorted(name for name, policy in POLICIES.items() if policy.evicts)


def state(keys: int = KEYS, layer: int = 0, rows: int = ROWS, seed: int = 0) -> KVState:
    """A layer of a cache that has everything any policy may read."""
    g = torch.Generator().manual_seed(seed + layer)
    shape = (rows, HEADS, keys)
    entries = torch.randn(*shape, WIDTH, generator=g), torch.randn(*shape, WIDTH, generator=g)
    return KVState(
        load=lambda: entries,
        positions=torch.arange(keys).expand(shape),
        valid=torch.ones(shape, dtype=torch.bool),
        visual=torch.zeros(shape, dtype=torch.bool),
        protected=torch.zeros(shape, dtype=torch.bool),
        seen=torch.full((rows,), keys),
        log_beta=-torch.rand(shape, generator=g),
        statistics={
            "window_rows": torch.rand(rows, HEADS, 6, keys, generator=g),
            "column_sums": 5 * torch.rand(shape, generator=g),
            "text_sums": torch.rand(shape, generator=g),
            "text_relevance": torch.rand(shape, generator=g),
            "text_counts": torch.arange(keys, 0, -1.0).expand(shape).clone(),
            "text_dense": torch.rand(shape, generator=g),
            "text_seen": torch.arange(keys, 0, -1.0).expand(shape).clone(),
            "window_peaks": torch.rand(rows, HEADS, 6, keys, generator=g),
            "modality_entropy": torch.rand(shape, generator=g),
            "observers": torch.rand(rows, HEADS, 6, 1, keys, generator=g),
            "output_norm": torch.rand(shape, generator=g),
            "row_mean": torch.rand(shape, generator=g),
            "row_variance": 0.01 * torch.rand(shape, generator=g),
            "row_entropy": torch.rand(shape, generator=g),
            "second_pass": torch.rand(shape, generator=g),
            "answer_pass": torch.rand(shape, generator=g),
            "expected_mean": torch.randn(rows, HEADS, 2, keys, generator=g),
            "expected_spread": torch.rand(rows, HEADS, 2, keys, generator=g),
        },
        layer=layer,
    )


def chosen(kv: KVState, slots: torch.Tensor) -> KVState:
    """The state with its entries rearranged or picked."""

    def pick(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, slots]

    statistics = {k: v[..., slots] for k, v in kv.statistics.items()}
    entries = pick(kv.keys), pick(kv.values)
    parts = (pick(x) for x in (kv.positions, kv.valid, kv.visual, kv.protected))
    return KVState(lambda: entries, *parts, kv.seen, pick(kv.log_beta), statistics, kv.layer)


def with_holes(kv: KVState, before: int, inside: int, at: int) -> tuple[KVState, torch.Tensor]:
    """The same entries, with garbage marked invalid in front and in the middle; and where the entries are."""
    count = kv.keys.shape[2]
    source = [0] * before + list(range(at)) + [at] * inside + list(range(at, count))
    slots = torch.tensor([*range(before, before + at), *range(before + at + inside, len(source))])
    wide = chosen(kv, torch.tensor(source))
    valid = torch.zeros_like(wide.valid)
    valid[:, :, slots] = True
    garbage = ~valid
    entries = wide.keys.masked_fill(garbage[..., None], 50.0), wide.values
    wide = replace(wide, load=lambda: entries)
    wide.valid, wide.positions = valid, wide.positions.masked_fill(garbage, -1)
    return wide, slots


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_scores_are_finite_deterministic_and_leave_the_state_alone(name):
    kv, policy = state(), POLICIES[name]()
    before = [x.clone() for x in (kv.keys, kv.values, kv.positions, *kv.statistics.values())]
    scores = policy.score(kv)
    assert scores.shape == (ROWS, HEADS, KEYS)
    assert torch.isfinite(scores).all()
    assert torch.equal(scores, POLICIES[name]().score(state()))
    after = (kv.keys, kv.values, kv.positions, *kv.statistics.values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_rows_are_scored_independently(name):
    kv, policy = state(rows=3), POLICIES[name]()
    entries = kv.keys[1:2], kv.values[1:2]
    own = KVState(
        lambda: entries,
        *(x[1:2] for x in (kv.positions, kv.valid, kv.visual, kv.protected, kv.seen, kv.log_beta)),
        {k: v[1:2] for k, v in kv.statistics.items()},
        kv.layer,
    )
    assert torch.allclose(policy.score(kv)[1:2], policy.score(own), atol=1e-6)


@pytest.mark.parametrize(("before", "inside"), [(3, 0), (0, 1), (0, 4), (2, 2)])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_padding_and_holes_do_not_change_scores(name, before, inside):
    kv, policy = state(), POLICIES[name]()
    wide, slots = with_holes(kv, before, inside, at=5)
    assert torch.allclose(policy.score(wide)[:, :, slots], policy.score(kv), atol=1e-6)


def winners(states: list[KVState], policy: Any, config: CacheConfig, budgets: torch.Tensor) -> torch.Tensor | None:
    """Which entries stay."""
    available = torch.stack([state.valid.sum(-1) for state in states])
    return decide(states, policy, config, budgets, available)


def keep(name: str, **changes: Any) -> tuple[torch.Tensor, list[KVState]]:
    states = [state(layer=layer) for layer in range(3)]
    config = CacheConfig(Budget(5.0), **changes)
    masks = winners(states, POLICIES[name](), config, torch.tensor([5, 4]))
    assert masks is not None
    return masks, states


@pytest.mark.parametrize("name", EVICTING)
def test_counts_are_met_per_head(name):
    masks, _ = keep(name, allocator="uniform")
    assert (masks[:, 0].sum(-1) == 5).all()
    assert (masks[:, 1].sum(-1) == 4).all()


@pytest.mark.parametrize("name", EVICTING)
def test_counts_are_met_in_one_pool(name):
    masks, _ = keep(name, allocator="global")
    assert masks.sum((0, 2, 3)).tolist() == [5 * 9, 4 * 9]


@pytest.mark.parametrize("name", EVICTING)
def test_counts_are_met_by_quota(name):
    masks, _ = keep(name, allocator="quota", quota=[[2.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    assert masks.sum((0, 2, 3)).tolist() == [5 * 9, 4 * 9]
    assert masks[0, 0].sum(-1).tolist() == [10, 5, 5]
    assert masks[2, 0, 2].sum() == 0


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("name", [name for name in EVICTING if POLICIES[name].first_share == 1])
def test_higher_scores_stay(name, scope):
    """Nothing that left ranks above what stayed, by tier and then by score, the policy's window aside."""
    policy = POLICIES[name]()
    masks, states = keep(name, allocator=scope)
    scores = torch.stack([policy.score(s) for s in states])
    tiers = torch.stack([torch.zeros_like(s.positions) if (x := policy.tiers(s)) is None else x for s in states])
    recent = torch.tensor([policy.recent(int(n)) for n in (5, 4)])
    free = torch.stack([s.positions for s in states]) < KEYS - recent[None, :, None, None]
    for row in range(ROWS):
        groups = [(slice(None), slice(None))]
        if scope == "uniform":
            groups = [(layer, head) for layer in range(3) for head in range(HEADS)]
        for layer, head in groups:
            place = (layer, row, head)
            kept = masks[place][free[place]].tolist()
            ranks = [*zip(tiers[place][free[place]].tolist(), scores[place][free[place]].tolist(), strict=True)]
            stayed = [rank for rank, stays in zip(ranks, kept, strict=True) if stays]
            left = [rank for rank, stays in zip(ranks, kept, strict=True) if not stays]
            assert left
            assert not stayed or max(left) <= min(stayed)


def test_nothing_over_budget_decides_nothing():
    for scope in ("uniform", "global"):
        config = CacheConfig(Budget(12.0), allocator=scope)
        assert winners([state()], Knorm(), config, torch.tensor([12, 40])) is None


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_has_a_preset(name):
    text = (CONFIGS / "policy" / f"{name}.yaml").read_text()
    assert f"{name}_schema" in text
    others = [file for file in (CONFIGS / "policy").glob("*.yaml") if file.stem not in POLICIES]
    assert all(re.search(r"defaults: \[(\w+)\]", file.read_text())[1] in POLICIES for file in others)


def test_full_never_evicts():
    assert not POLICIES["full"].evicts
    assert all(POLICIES[name].evicts for name in EVICTING)
    assert len(EVICTING) == len(POLICIES) - 1


def test_knorm_prefers_small_keys():
    kv = state()
    keys = torch.ones_like(kv.keys) * torch.tensor([3.0, 1, 2, *range(4, 13)])[None, None, :, None]
    kv = replace(state(), load=lambda: (keys, keys))
    scores = Knorm().score(kv)
    assert scores[0, 0].argsort(descending=True)[:3].tolist() == [1, 2, 0]
    assert scores[0, 0, 1] == pytest.approx(-math.sqrt(WIDTH))


def test_layers_that_knorm_skips_keep_everything_and_the_others_pay():
    states, budgets = [state(layer=n) for n in range(4)], torch.tensor([6, 2])
    policy = Knorm(skip_layers=[0, 2])
    masks = winners(states, policy, CacheConfig(Budget(6.0)), budgets)
    assert masks.sum(-1)[:, :, 0].T.tolist() == [[11, 1, 11, 1], [3, 1, 3, 1]], "as far as the total reaches"
    masks = winners(states, policy, CacheConfig(Budget(6.0)), torch.tensor([9, 9]))
    assert masks.sum(-1)[:, 0, 0].tolist() == [12, 6, 12, 6]
    own = Knorm().score(states[1])[0, 0].topk(6).indices
    assert masks[1, 0, 0, own].all()
    assert (winners(states, Knorm(), CacheConfig(Budget(6.0)), budgets).sum(-1)[:, 0] == 6).all()


def test_keydiff_prefers_the_odd_one_out():
    keys = torch.zeros_like(state().keys)
    keys[..., 0] = torch.arange(1.0, KEYS + 1)
    keys[:, :, 7, :2] = torch.tensor([-1.0, 0.5])
    kv = replace(state(), load=lambda: (keys, keys))
    scores = KeyDiff().score(kv)
    assert (scores.argmax(-1) == 7).all()
    one = kv.keys[0, 0]
    anchor = (one / one.norm(dim=-1, keepdim=True)).mean(0)
    expected = -(one @ anchor) / (one.norm(dim=-1) * anchor.norm())
    assert torch.allclose(scores[0, 0], expected, atol=1e-6)


def test_streaming_keeps_sinks_and_the_newest():
    masks = winners([state()], StreamingLLM(sinks=2), CacheConfig(Budget(5.0)), torch.tensor([5, 3]))
    assert torch.nonzero(masks[0, 0, 0]).flatten().tolist() == [0, 1, 9, 10, 11]
    assert torch.nonzero(masks[0, 1, 2]).flatten().tolist() == [0, 1, 11]
    masks = winners([state()], StreamingLLM(sinks=4), CacheConfig(Budget(3.0)), torch.tensor([3, 3]))
    assert torch.nonzero(masks[0, 0, 0]).flatten().tolist() == [1, 2, 3]


def test_h2o_divides_by_the_queries_that_saw_a_key():
    kv = state()
    sums = kv.statistics["column_sums"]
    assert torch.equal(H2O(normalise="raw").score(kv), sums)
    assert torch.allclose(H2O().score(kv), sums / torch.arange(KEYS, 0, -1))
    masks = winners([kv], H2O(), CacheConfig(Budget(5.0)), torch.tensor([5, 4]))
    assert masks[0, :, :, -2:].all()
    heavy = (sums / torch.arange(KEYS, 0, -1))[0, 0, :-2].topk(3).indices
    assert masks[0, 0, 0, heavy].all()


def test_snapkv_pools_the_mean_of_its_window():
    kv = state()
    rows = kv.statistics["window_rows"]
    mean = rows[:, :, -4:].mean(2)
    assert torch.allclose(SnapKV(window_size=4, kernel_size=1).score(kv), mean)
    for pooling in ("avg", "max"):
        pooled = SnapKV(window_size=4, kernel_size=5, pooling=pooling).score(kv)
        for key in range(KEYS):
            low, high = (0, KEYS - 4) if key < KEYS - 4 else (KEYS - 4, KEYS)  # never across the window
            near = mean[..., max(low, key - 2) : min(high, key + 3)]
            expected = near.mean(-1) if pooling == "avg" else near.amax(-1)
            assert torch.allclose(pooled[..., key], expected, atol=1e-6)
    assert torch.allclose(SnapKV(window_size=64, kernel_size=1).score(kv), rows.mean(2))


def test_snapkv_keeps_its_window_within_half_the_budget():
    assert [SnapKV(window_size=4).recent(n) for n in (3, 8, 20)] == [1, 4, 4]
    kv = state()
    kv.statistics["window_rows"][..., :9] += 10.0
    masks = winners([kv], SnapKV(window_size=4), CacheConfig(Budget(8.0)), torch.tensor([8, 4]))
    assert masks[0, 0, :, -4:].all()
    assert masks[0, 1, :, -2:].all()
    assert not masks[0, 1, :, -4:-2].any()


def test_random_depends_on_seed_layer_head_and_position_only():
    policy, kv = Random(), state()
    scores = policy.score(kv)
    assert torch.equal(scores[0], scores[1])
    assert scores.min() >= 0
    assert scores.max() < 1
    part = torch.tensor([2, 5, 6, 11])
    assert torch.equal(policy.score(chosen(kv, part)), scores[:, :, part])
    assert not torch.equal(scores[0, 0], scores[0, 1])
    assert not torch.equal(policy.score(state(layer=1))[0, 0], scores[0, 0])
    assert not torch.equal(Random(seed=1).score(kv), scores)
    many = Random().score(state(keys=4000, rows=1)).flatten()
    assert abs(float(many.mean()) - 0.5) < 0.02
    assert abs(float(many.var()) - 1 / 12) < 0.005


@pytest.mark.parametrize("policy", [TrimKV(), DBTrimKV()], ids=["trim_kv", "db_trim_kv"])
def test_gates_rank_by_retention_at_the_next_query(policy):
    kv = state()
    scores = policy.score(kv)
    assert torch.equal(scores[..., -1], kv.log_beta[..., -1])
    assert torch.allclose(scores, kv.log_beta * torch.arange(KEYS, 0, -1))
    kv.log_beta = torch.full_like(kv.log_beta, -0.1)
    kv.log_beta[:, :, 3] = -1e-4
    masks = winners([kv], policy, CacheConfig(Budget(4.0)), torch.tensor([4, 4]))
    kept = [3, 9, 10, 11]
    assert torch.equal(masks[0, 0, 0], torch.isin(torch.arange(KEYS), torch.tensor(kept)))


def test_one_pool_gives_entries_to_the_heads_that_forget_slowly():
    kv = state()
    kv.log_beta = torch.tensor([-1e-6, -0.5, -5.0])[None, :, None].expand(ROWS, HEADS, KEYS)
    masks = winners([kv], DBTrimKV(), CacheConfig(Budget(5.0)), torch.tensor([5, 4]))
    assert masks[0].sum(-1).tolist() == [[12, 3, 0], [12, 0, 0]]
    masks = winners([kv], TrimKV(), CacheConfig(Budget(5.0)), torch.tensor([5, 4]))
    assert masks[0].sum(-1).tolist() == [[5, 5, 5], [4, 4, 4]]


@pytest.mark.parametrize(
    ("policy", "values"),
    [
        (SnapKV, {"window_size": 0}),
        (SnapKV, {"window_size": 65}),
        (SnapKV, {"kernel_size": 4}),
        (SnapKV, {"pooling": "sum"}),
        (Knorm, {"skip_layers": [-1]}),
        (H2O, {"normalise": "mean"}),
        (H2O, {"recent_share": 1.0}),
    ],
)
def test_impossible_settings_are_refused(policy, values):
    with pytest.raises(ValueError, match=f"{policy.__name__.lower()}.{next(iter(values))}"):
        policy(**values)
