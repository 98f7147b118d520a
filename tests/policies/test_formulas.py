"""Policies against their formulas, written out entry by entry."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retention import POLICIES, Budget, CacheConfig
from retention.ops.scores import covering_count, naive_redundancy, redundancy
from retention.policies.cake import Cake
from retention.policies.criticalkv import CriticalKV
from retention.policies.expected_attention import ExpectedAttention
from retention.policies.lagkv import LagKV
from retention.policies.mada import Mada
from retention.policies.meda import Meda
from retention.policies.mixkv import MixKV
from retention.policies.prefixkv import PrefixKV
from retention.policies.r_kv import RKV
from retention.policies.snapkv import SnapKV
from retention.policies.vl_cache import VLCache
from tests.policies.test_matrix import HEADS, KEYS, ROWS, state, winners, with_holes

VISUAL = [1, 2, 5, 6, 8]
LAYERS = 4
WEIGHING = ["mada", "cake", "prefixkv", "vl_cache", "meda"]


def multimodal(layer: int = 0, keys: int = KEYS, **changes: Any) -> Any:
    kv = state(keys=keys, layer=layer)
    visual = torch.isin(torch.arange(keys), torch.tensor(VISUAL)).expand(ROWS, HEADS, keys).clone()
    return replace(kv, visual=visual, **changes)


def wide_holes(kv: Any) -> tuple[Any, Tensor]:
    wide, slots = with_holes(kv, 2, 2, at=5)
    return wide, slots


# --- mada ---------------------------------------------------------------------------------------------------


def naive_mada(kv: Any, row: int, head: int, theta: float, proxies: int) -> tuple[list[float], float, int]:
    """psi, the visual share and the entries that both modalities need."""
    rows = kv.statistics["window_rows"][row, head, -proxies:]
    psi = [float(sum(r[j] for r in rows)) for j in range(rows.shape[-1])]
    heeded: list[float] = []
    need = 0
    for kind in (True, False):
        own = sorted((p for p, v in zip(psi, kv.visual[row, head].tolist(), strict=True) if v == kind), reverse=True)
        heeded.append(sum(own))
        covered = 0.0
        for p in own:
            if covered >= theta * sum(own):
                break
            covered += p
            need += 1
    return psi, heeded[0] / sum(heeded), need


@pytest.mark.parametrize("theta", [0.3, 0.9, 1.0])
def test_mada_prefers_and_needs_what_the_formulas_say(theta):
    kv, policy = multimodal(), Mada(proxies=4, theta=theta)
    score, share, weight = policy.score(kv), policy.visual_share(kv), policy.layer_weight(kv)
    for row in range(ROWS):
        needs = []
        for head in range(HEADS):
            psi, part, need = naive_mada(kv, row, head, theta, 4)
            assert torch.allclose(score[row, head], torch.tensor(psi), atol=1e-5)
            assert float(share[row, head]) == pytest.approx(part, rel=1e-5)
            needs.append(need)
        assert float(weight[row]) == pytest.approx(sum(needs) / HEADS)


def test_mada_keeps_the_best_of_each_modality_and_the_exact_total():
    layers, policy = [multimodal(n) for n in range(LAYERS)], Mada(proxies=4)
    layers[0].statistics["window_rows"][..., 3:] *= 1e-3
    budgets = torch.tensor([5, 4])
    masks = winners(layers, policy, CacheConfig(Budget(5.0)), budgets)
    assert masks is not None
    assert masks.sum((0, 2, 3)).tolist() == [n * LAYERS * HEADS for n in (5, 4)]
    assert torch.equal(masks.sum((0, 3)), (budgets * LAYERS)[:, None].expand(ROWS, HEADS))
    counts = masks.sum(-1)
    assert (counts[0] < counts[1:].float().mean(0)).all()
    for layer, kv in enumerate(layers):
        share = policy.visual_share(kv)
        for row in range(ROWS):
            for head in range(HEADS):
                kept, seen = masks[layer, row, head], kv.visual[row, head]
                total = int(kept.sum())
                wanted = min(
                    max(int(total * float(share[row, head]) + 0.5), total - int((~seen).sum())), int(seen.sum())
                )
                assert int((kept & seen).sum()) == wanted
                for kind in (seen, ~seen):
                    inside, outside = (policy.score(kv)[row, head][kind & x] for x in (kept, ~kept))
                    assert not len(inside) or not len(outside) or inside.min() >= outside.max()


def test_mada_without_compensation_gives_layers_the_same():
    layers = [multimodal(n) for n in range(LAYERS)]
    layers[0].statistics["window_rows"][..., 3:] *= 1e-3
    masks = winners(layers, Mada(compensate=False), CacheConfig(Budget(5.0)), torch.tensor([5, 4]))
    assert masks is not None
    assert masks[:, 0].sum(-1).unique().tolist() == [5]


def test_mada_without_preference_splits_by_what_is_there():
    kv = multimodal()
    counts = (kv.visual & kv.valid).sum(-1).double(), kv.valid.sum(-1).double()
    share = Mada(preference=False).visual_share(kv)
    assert torch.allclose(share, counts[0] / counts[1])
    assert not torch.allclose(share, Mada().visual_share(kv))


def test_mada_without_an_observation_keeps_the_newest_in_proportion():
    layers = [replace(multimodal(n), statistics={}) for n in range(2)]
    masks = winners(layers, Mada(), CacheConfig(Budget(5.0)), torch.tensor([5, 5]))
    assert masks is not None
    assert torch.nonzero(masks[0, 0, 0]).flatten().tolist() == [6, 8, 9, 10, 11]  # 5 * 5 / 12 visual ones


def test_nothing_heeded_is_covered_by_nothing():
    scores = torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.2, 0.8]])
    assert covering_count(scores, torch.ones(3, 2, dtype=torch.bool), 0.8).tolist() == [0, 2, 1]


# --- what layers are worth ----------------------------------------------------------------------------------


def test_cake_pools_mean_and_variance_and_weighs_dispersion_and_variance(monkeypatch):
    monkeypatch.setattr("retention.policies.cake.MOMENT_ROWS", 3)
    kv, policy = state(), Cake(gamma=3.0, tau1=2.0, tau2=0.5, kernel_size=3)
    raw = kv.statistics["row_mean"] + 3.0 * kv.statistics["row_variance"]
    for key in range(KEYS):
        low, high = (0, KEYS - 3) if key < KEYS - 3 else (KEYS - 3, KEYS)  # never across the window
        near = raw[..., max(low, key - 1) : min(high, key + 2)].mean(-1)
        assert torch.allclose(policy.score(kv)[..., key], near, atol=1e-5)
    spread = kv.statistics["row_entropy"][..., :-3].sum((1, 2)).double()
    unrest = kv.statistics["row_variance"][..., :-3].sum((1, 2)).double()
    preference = policy.layer_weight(kv)
    assert torch.allclose(preference, spread**0.5 * unrest**2)
    budgets = torch.tensor([10, 5])
    weights = policy.layer_weights(torch.tensor([[3.0, 0.0], [1.0, 0.0]]).double(), budgets)
    assert torch.allclose(weights[:, 0], 3 + 7 * 2 * torch.tensor([0.75, 0.25]).double())
    assert weights[:, 1].tolist() == [5.0, 5.0]


def test_prefixkv_finds_one_mass_for_all_layers():
    """Against all masses at which a budget changes, one by one."""
    layers, policy = [state(layer=n) for n in range(LAYERS)], PrefixKV()
    for number, kv in enumerate(layers):
        kv.statistics["column_sums"] = kv.statistics["column_sums"] ** (2 * number + 1)
    readings, budgets = torch.stack([policy.layer_weight(kv) for kv in layers]), torch.tensor([5, 3])
    found = policy.layer_weights(readings, budgets)
    for row in range(ROWS):
        curves = []
        for kv in layers:
            mean = sorted(kv.statistics["column_sums"][row].mean(0).double().tolist(), reverse=True)
            curves.append([sum(mean[: i + 1]) / sum(mean) for i in range(KEYS)])
        best: list[int] = []
        for p in sorted(x for curve in curves for x in curve):
            counts = [sum(x < p - 1e-9 for x in curve) + 1 for curve in curves]
            if sum(counts) <= LAYERS * int(budgets[row]):
                best = counts
        assert found[:, row].tolist() == best
    assert found[0, 0] > found[-1, 0]


def test_vl_cache_weighs_density_and_ranks_a_layer_as_one():
    kv, policy = state(), VLCache()
    dense, seen = (kv.statistics[name].sum((1, 2)).double() for name in ("text_dense", "text_seen"))
    assert torch.allclose(policy.layer_weight(kv), dense / seen)
    mean = kv.statistics["text_sums"].mean(1, keepdim=True).expand(ROWS, HEADS, KEYS)
    assert torch.allclose(policy.score(kv), mean)
    assert torch.equal(VLCache(per_head=True).score(kv), kv.statistics["text_sums"])
    assert [policy.recent(n) for n in (9, 10, 25)] == [0, 1, 2]


def test_meda_weighs_entropies_between_modalities():
    kv, policy = multimodal(), Meda()
    seen = torch.isin(torch.arange(KEYS), torch.tensor(VISUAL))
    received = kv.statistics["modality_entropy"].mean(1)
    expected = received[:, seen].sum(-1) / (KEYS - 5) + received[:, ~seen].sum(-1) / 5
    assert torch.allclose(policy.layer_weight(kv).float(), expected)
    weights = policy.layer_weights(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([5, 5]))
    assert torch.allclose(weights, torch.tensor([[0.7311, 0.5], [0.2689, 0.5]]), atol=1e-4)
    assert torch.equal(policy.tiers(kv)[0, 0], (~seen).long())
    assert policy.recent(7) == 3


@pytest.mark.parametrize("name", WEIGHING)
def test_totals_are_exact_and_rows_alone_give_the_same(name):
    layers, policy, config = [multimodal(n) for n in range(LAYERS)], POLICIES[name](), CacheConfig(Budget(5.0))
    masks = winners(layers, policy, config, torch.tensor([5, 4]))
    assert masks is not None
    assert masks.sum((0, 2, 3)).tolist() == [n * LAYERS * HEADS for n in (5, 4)]
    for row in range(ROWS):
        own = []
        for kv in layers:
            keys, values = kv.keys[row : row + 1], kv.values[row : row + 1]
            part = {k: v[row : row + 1] for k, v in kv.statistics.items()}
            names = ("positions", "valid", "visual", "protected", "seen", "log_beta")
            marks = {n: getattr(kv, n)[row : row + 1] for n in names}
            own.append(replace(kv, load=lambda k=keys, v=values: (k, v), statistics=part, **marks))
        alone = winners(own, policy, config, torch.tensor([(5, 4)[row]]))
        assert alone is not None
        assert torch.equal(alone[:, 0], masks[:, row])


@pytest.mark.parametrize("name", WEIGHING)
def test_padding_and_holes_do_not_change_what_layers_are_worth(name):
    kv, policy = multimodal(), POLICIES[name]()
    wide, _ = wide_holes(kv)
    readings = policy.layer_weight(kv), policy.layer_weight(wide)
    assert torch.allclose(*readings)
    if name == "mada":
        assert torch.allclose(policy.visual_share(kv), policy.visual_share(wide))


# --- scores -------------------------------------------------------------------------------------------------


def naive_lagkv(kv: Any, row: int, head: int, lag: int, sinks: int, ranks: bool) -> dict[int, float]:
    """Scores of the entries that are compared, by slot."""
    slots = torch.nonzero(kv.valid[row, head]).flatten().tolist()
    parts = (len(slots) - sinks) // lag
    scores: dict[int, float] = {}
    for p in range(parts - 1):
        own, behind = (slots[sinks + q * lag : sinks + (q + 1) * lag] for q in (p, p + 1))
        total = torch.zeros(lag)
        for x in (kv.keys[row, head], kv.values[row, head]):
            low, high = x[behind].min(0).values, x[behind].max(0).values
            total += ((x[own] - low) / (high - low)).std(-1).softmax(0) / 2
        order = total.argsort().tolist()
        scores |= {slot: (order.index(i) + 1) / lag if ranks else float(total[i]) for i, slot in enumerate(own)}
    return scores


@pytest.mark.parametrize("ranks", [True, False])
@pytest.mark.parametrize("holes", [False, True])
def test_lagkv_measures_partitions_against_the_next(ranks, holes):
    kv, policy = state(keys=22), LagKV(lag_size=4, sinks=3, cross_scoring=not ranks)
    kv = wide_holes(kv)[0] if holes else kv
    score, tiers = policy.score(kv), policy.tiers(kv)
    for row in range(ROWS):
        for head in range(HEADS):
            expected = naive_lagkv(kv, row, head, 4, 3, ranks)
            assert len(expected) == 12
            for slot, value in expected.items():
                assert float(score[row, head, slot]) == pytest.approx(value, rel=1e-5)
            slots = torch.nonzero(kv.valid[row, head]).flatten()
            assert tiers[row, head, slots].tolist() == [2] * 3 + [0] * 12 + [1] * 7


def test_lagkv_gives_every_partition_the_same_share():
    masks = winners([state(keys=22)], LagKV(lag_size=4, sinks=3), CacheConfig(Budget(13.0)), torch.tensor([13, 16]))
    assert masks is not None
    assert masks[0, 0, :, :3].all()
    assert masks[0, :, :, 15:].all()
    assert masks[0, 0, :, 3:15].unflatten(-1, (3, 4)).sum(-1).tolist() == [[1, 1, 1]] * HEADS
    assert masks[0, 1, :, 3:15].unflatten(-1, (3, 4)).sum(-1).tolist() == [[2, 2, 2]] * HEADS


def test_a_short_lagkv_keeps_sinks_and_the_most_recent():
    masks = winners([state()], LagKV(sinks=2), CacheConfig(Budget(5.0)), torch.tensor([5, 3]))
    assert masks is not None
    assert torch.nonzero(masks[0, 0, 0]).flatten().tolist() == [0, 1, 9, 10, 11]
    assert torch.nonzero(masks[0, 1, 0]).flatten().tolist() == [0, 1, 11]


def test_a_constant_channel_counts_as_nothing_for_lagkv():
    kv = state(keys=20)
    entries = kv.keys.clone(), kv.values
    entries[0][..., 2] = 1.5
    assert torch.isfinite(LagKV(lag_size=4, sinks=0).score(replace(kv, load=lambda: entries))).all()


@pytest.mark.parametrize("block", [3, 256])
def test_redundancy_in_blocks_equals_naive(monkeypatch, block):
    monkeypatch.setattr("retention.ops.scores.BLOCK", block)
    kv = state()
    keys = kv.keys.clone()
    keys[:, :, 7] = 2 * keys[:, :, 3]
    keys[:, 1, 9] = keys[:, 1, 3]
    kv = replace(kv, load=lambda: (keys, keys))
    for case in (kv, wide_holes(kv)[0]):
        found, expected = (f(case.keys, case.valid, 0.5) for f in (redundancy, naive_redundancy))
        assert torch.allclose(found * case.valid, expected, atol=1e-6)


def test_r_kv_sets_attention_against_redundancy():
    kv, policy = state(), RKV(window_size=2, kernel_size=3, lam=0.4)
    score = policy.score(kv)
    for row in range(ROWS):
        for head in range(HEADS):
            rows = kv.statistics["window_peaks"][row, head, -2:, :-2]
            mean = (rows / rows.sum(-1, keepdim=True)).mean(0)
            peaks = [float(mean[max(0, j - 1) : j + 2].max()) for j in range(KEYS - 2)] + [0.0, 0.0]
            repeated = naive_redundancy(kv.keys, kv.valid, 0.5)[row, head].softmax(0)
            assert torch.allclose(score[row, head], 0.4 * torch.tensor(peaks) - 0.6 * repeated, atol=1e-6)
    unseen = replace(kv, statistics={})
    assert torch.allclose(policy.score(unseen), -0.6 * naive_redundancy(kv.keys, kv.valid, 0.5).softmax(-1))


def test_r_kv_keeps_the_newest_of_copies():
    kv = state(keys=20)
    keys = torch.eye(20)[None, None].expand(ROWS, HEADS, 20, 20).clone()
    keys[:, :, [2, 6, 10]] = torch.eye(20)[0]
    kv = replace(kv, load=lambda: (keys, keys), statistics={})
    score = RKV().score(kv)
    assert (score[..., 10] > score[..., 6]).all()
    assert (score[..., [0, 2, 6]].amax(-1) < score[..., 5]).all()


def test_mixkv_mixes_importance_and_diversity():
    kv, policy = state(), MixKV(window_size=4, kernel_size=1)
    score = policy.score(kv)
    for row in range(ROWS):
        for head in range(HEADS):
            snap = kv.statistics["window_rows"][row, head, -4:].mean(0)
            unit = F.normalize(kv.keys[row, head], dim=-1)
            cosines = unit @ unit.T
            alike = (cosines.sum() - cosines.diagonal().sum()) / (KEYS * (KEYS - 1))

            def level(x: Tensor, snap: Tensor = snap) -> Tensor:
                x = (x - x.min()) / (x.max() - x.min())
                return x * snap.mean() / x.mean()

            importance = snap + level(kv.values[row, head].norm(dim=-1))
            diversity = level(-unit @ unit.mean(0))
            assert torch.allclose(score[row, head], (1 - alike) * importance + alike * diversity, atol=1e-5)


def test_mixkv_reads_its_mixture_from_a_table():
    kv, settings = state(layer=1), {"window_size": 4, "kernel_size": 1}
    table = [[0.5] * HEADS, [0.0, 0.25, 1.0]]
    score = MixKV(table=table, **settings).score(kv)
    ends = [MixKV(table=[[r] * HEADS] * 2, **settings).score(kv) for r in (0.0, 1.0)]
    for head, r in enumerate(table[1]):
        assert torch.allclose(score[:, head], (1 - r) * ends[0][:, head] + r * ends[1][:, head], atol=1e-6)
    with pytest.raises(ValueError, match=rf"{HEADS} numbers for layer 1, got 0"):
        MixKV(table=[[0.5] * HEADS], **settings).score(kv)
    with pytest.raises(ValueError, match=r"mixkv\.table"):
        MixKV(table=[[2.0]])


def test_criticalkv_fills_the_second_half_by_the_output():
    kv, policy = state(), CriticalKV().over(SnapKV(window_size=1, kernel_size=1))
    masks = winners([kv], policy, CacheConfig(Budget(7.0)), torch.tensor([7, 4]))
    assert masks is not None
    score = policy.score(kv)
    second = (score + 1e-4) * kv.statistics["output_norm"]
    for row, budget in enumerate((7, 4)):
        for head in range(HEADS):
            kept = {KEYS - 1}
            for ranks, until in ((score, budget // 2), (second, budget)):
                for slot in ranks[row, head].argsort(descending=True).tolist():
                    if len(kept) < until:
                        kept.add(slot)
            assert set(torch.nonzero(masks[0, row, head]).flatten().tolist()) == kept


def test_padded_rows_do_not_count_against_the_constant_of_criticalkv():
    kv, policy = state(), CriticalKV().over(SnapKV(kernel_size=1))
    rows = kv.statistics["window_rows"]
    more = replace(kv, statistics={**kv.statistics, "window_rows": F.pad(rows, (0, 0, 5, 0))})
    assert torch.allclose(policy.score(more), policy.score(kv))


@pytest.mark.parametrize("use_covariance", [True, False])
@pytest.mark.parametrize("use_vnorm", [True, False])
def test_expected_attention_is_a_softmax_times_the_norm_of_the_value(use_covariance, use_vnorm):
    kv = state()
    logits = kv.statistics["expected_mean"] + use_covariance * kv.statistics["expected_spread"]
    expected = (logits - logits[..., 4:].logsumexp(-1, keepdim=True)).exp().mean(2)
    assert torch.allclose(expected[..., 4:], logits[..., 4:].softmax(-1).mean(2))
    expected = expected * (kv.values.norm(dim=-1) if use_vnorm else 1.0)
    score = ExpectedAttention(use_covariance=use_covariance, use_vnorm=use_vnorm).score(kv)
    assert torch.allclose(score, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("policy", "values"),
    [
        (Mada, {"proxies": 0}),
        (Mada, {"theta": 0.0}),
        (Cake, {"kernel_size": 2}),
        (Cake, {"tau1": 0.0}),
        (LagKV, {"lag_size": 1}),
        (LagKV, {"sinks": -1}),
        (RKV, {"window_size": 65}),
        (RKV, {"kernel_size": 2}),
        (RKV, {"lam": 1.5}),
        (VLCache, {"recent_share": 1.0}),
        (Meda, {"recent_share": -0.1}),
    ],
)
def test_impossible_settings_are_refused(policy, values):
    with pytest.raises(ValueError, match=f"{policy.__name__.lower()}.{next(iter(values))}"):
        policy(**values)


@pytest.mark.parametrize("policy", [Cake, ExpectedAttention, PrefixKV])
def test_policies_for_prompts_say_so(policy):
    with pytest.raises(ValueError, match=f"{policy.__name__} decides right after a prompt"):
        policy().score(replace(state(), statistics={}))
