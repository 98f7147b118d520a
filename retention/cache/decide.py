"""Who stays: a policy's scores, an allocator's counts and a selector, brought together for all layers at once."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from retention.budget import ALLOCATORS, BY_CONTENT, AllocationInput, LayerPool, MixedPool, Pool, Split
from retention.cache.config import CacheConfig
from retention.ops import select
from retention.policies import Policy
from retention.policies.base import StepRule
from retention.types import KVState

Curve = Callable[[str | None, bool, Tensor], Tensor]
"""From what a policy ranks by, whether at its default settings, and budgets, to thresholds."""
Counted = Tensor | Pool | LayerPool | Split
"""Counts by layer, row and head, or what the selector divides further."""


def decide(
    states: Iterable[KVState],
    policy: Policy,
    config: CacheConfig,
    budgets: Int[Tensor, " batch"],
    available: Int[Tensor, "layers batch kv_heads"],
    *,
    only: int | None = None,
    curve: Curve | None = None,
) -> Bool[Tensor, "some_layers batch kv_heads keys"] | None:
    """Score, allocate, select; None when everything fits. `states` is read once, one layer at a time.

    With `only`, `states` holds that layer alone and it is decided alone: see `decides_by_layer`. `curve` gives the
    threshold of a budget.

    Raises:
        ValueError: when selector and allocator do not fit, or protected entries alone exceed the budget.
    """
    name = config.allocator or policy.allocator
    selector = _selector(policy, config, name)
    if selector != "threshold" and not (available > budgets[None, :, None]).any():
        return None
    given, entries = _given(policy, config, budgets, available), None
    if name in BY_CONTENT:
        entries = _entries(states, policy)
        given.available = available if only is None else available[only : only + 1]
        given.available_visual = (entries.visual & entries.valid).sum(-1)
        given.weights = None if entries.readings is None else policy.layer_weights(entries.readings, budgets)
        given.visual_share = config.visual_share if entries.shares is None else entries.shares
    counts = ALLOCATORS[name](budgets, given)
    if selector != "threshold" and _fits(available, counts):
        return None
    entries = entries or _entries(states, policy)
    if only is not None:
        counts = _of_layer(counts, only)
    window = _window(policy, _of_head(counts, budgets))
    ranking = _ranking(entries, config, window, firm=selector == "threshold")
    if selector == "threshold":
        return select.keep_threshold(ranking, _threshold(policy, config, budgets, curve))
    if isinstance(counts, MixedPool) or (isinstance(counts, LayerPool) and entries.second is not None):
        won = _choose(ranking, entries, counts, config, selector).sum(-1)
        counts = counts.settled(won, entries.valid.sum(-1))
    if entries.second is not None:
        ranking = _second_stage(ranking, entries, policy.first_share, counts, config, selector)
    return _choose(ranking, entries, counts, config, selector)


def _threshold(
    policy: Policy, config: CacheConfig, budgets: Int[Tensor, " batch"], curve: Curve | None
) -> float | Float[Tensor, " batch"]:
    """The threshold that was given, or that of the gates for the budget."""
    if config.threshold is not None:
        return config.threshold
    if curve is None:
        raise ValueError(
            "selector=threshold without cache.threshold needs gates with a calibration curve, got none; give one of them"
        )
    return curve(policy.gates_of, policy == type(policy)(), budgets)


def drop_one(
    states: Iterable[KVState], rule: StepRule, config: CacheConfig
) -> Bool[Tensor, "layers batch kv_heads keys"] | None:
    """After a decoded token: of each head that holds more than its allowance, the lowest by the rule leaves.

    Protected entries never do; of several lowest, the oldest leaves. Heads that may drop nothing hold more for a while.
    """
    masks = []
    for kv in states:
        assert kv.allowance is not None
        age = kv.seen[:, None, None] - kv.positions
        stays = kv.protected | (kv.positions < config.sink_size) | (age <= config.recent_size) | ~kv.valid
        score = rule(kv).float().masked_fill(stays, torch.inf)
        least = score.amin(-1, keepdim=True)
        over = (kv.valid.sum(-1) > kv.allowance)[..., None] & torch.isfinite(least)
        lowest = score == least
        masks.append(kv.valid & ~(lowest & (lowest.cumsum(-1) == 1) & over))
    return _stacked(masks)


def _choose(
    ranking: select.Ranking, entries: "_Entries", counts: Counted, config: CacheConfig, selector: str
) -> Bool[Tensor, "layers batch kv_heads keys"]:
    """The selector that fits the counts."""
    match counts:
        case Pool(totals):
            return select.keep_global(ranking, totals, min_per_head=config.min_per_head)
        case LayerPool(totals=totals, floors=floors):
            return select.keep_by_layer_pool(ranking, totals, floors)
        case Split(visual, text):
            return select.keep_by_modality(ranking, entries.visual, visual, text)
    return (select.keep_per_layer if selector == "layer" else select.keep_per_head)(ranking, counts)


def _second_stage(
    ranking: select.Ranking, entries: "_Entries", share: float, counts: Counted, config: CacheConfig, selector: str
) -> select.Ranking:
    """The ranking by the second score, with what the first one chose from its share of the budget ahead of the rest."""
    assert entries.second is not None
    part = _scaled(counts, share)
    tiers = torch.zeros_like(ranking.positions) if ranking.tiers is None else ranking.tiers
    first = torch.where(ranking.protected, tiers.amax() + 1, tiers)  # not protected: they may be more than the part
    none = torch.zeros_like(ranking.protected)
    chosen = _choose(replace(ranking, protected=none, tiers=first), entries, part, config, selector)
    return replace(ranking, scores=entries.second, tiers=2 * tiers + chosen)


def _scaled(counts: Counted, share: float) -> Counted:
    """A part of every count, rounded down."""
    if isinstance(counts, Tensor):
        return (share * counts.double()).floor().long()
    parts = {field.name: _scaled(getattr(counts, field.name), share) for field in fields(counts)}
    return type(counts)(**parts)  # type: ignore[arg-type]


def _of_layer(counts: Counted, layer: int) -> Counted:
    """The counts of one layer, where they are not of that layer alone already."""
    if isinstance(counts, Tensor):
        return counts[layer : layer + 1]
    if isinstance(counts, LayerPool):
        return replace(counts, totals=counts.totals[layer : layer + 1], floors=counts.floors[layer : layer + 1])
    return counts


def decides_by_layer(policy: Policy, config: CacheConfig) -> bool:
    """Whether what a layer keeps depends on no other layer's scores, so that it may be evicted before they ran."""
    allocator = config.allocator or policy.allocator
    weighs = allocator in BY_CONTENT and policy.weighs_layers
    alone = not weighs and policy.second_pass() is None
    return alone and _selector(policy, config, allocator) != "global"


def _selector(policy: Policy, config: CacheConfig, allocator: str) -> str:
    """The selector in force: an allocator that was overridden brings the selector it needs."""
    needed = {"global": "global", "modality": "head", "head_adaptive": "head"}.get(allocator)
    default = needed or ("head" if policy.selector == "global" else policy.selector)
    chosen = config.selector or default
    if allocator in ("modality", "head_adaptive") and chosen != "head":
        raise ValueError(
            f"selector {chosen!r} and allocator {allocator!r} do not fit: it counts entries inside each layer or "
            "head by itself; use selector 'head', or another allocator"
        )
    if chosen != "threshold" and (chosen == "global") != (allocator == "global"):
        raise ValueError(
            f"selector {chosen!r} and allocator {allocator!r} do not fit: the global "
            "selector needs the global allocator, and the other way round"
        )
    return chosen


def _given(
    policy: Policy,
    config: CacheConfig,
    budgets: Int[Tensor, " batch"],
    available: Int[Tensor, "layers batch kv_heads"],
) -> AllocationInput:
    """What allocators may know before anything is scored."""
    device = available.device
    return AllocationInput(
        available,
        quota=None if config.quota is None else torch.tensor(config.quota, device=device),
        layer_weights=None if config.layer_weights is None else torch.tensor(config.layer_weights, device=device),
        window=_window(policy, budgets).clamp(min=config.recent_size),
        pyramid_beta=config.pyramid_beta,
        integer_floor=config.integer_floor,
        head_floor=config.head_floor,
        head_form=config.head_form,
        least=max(policy.least, config.sink_size + config.recent_size),
        redistributes=policy.redistributes,
    )


def _fits(available: Int[Tensor, "layers batch kv_heads"], counts: Counted) -> bool:
    """Whether nothing has to leave."""
    match counts:
        case Pool(totals):
            return not (available.sum((0, 2)) > totals).any()
        case LayerPool(totals=totals):
            return not (available.sum(2) > totals).any()
        case Split(visual, text):
            return not (available > visual + text).any()
    return not (available > counts).any()


def _of_head(counts: Counted, budgets: Int[Tensor, " batch"]) -> Int[Tensor, "layers batch kv_heads"]:
    """Entries that each head may count on; in a pool the average."""
    if isinstance(counts, Pool | LayerPool):
        return budgets[None, :, None]
    return counts.visual + counts.text if isinstance(counts, Split) else counts


def _window(policy: Policy, counts: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """Newest entries that the policy itself keeps of each count."""
    values, place = counts.unique(return_inverse=True)
    table = [policy.recent(value) for value in values.tolist()]
    return torch.tensor(table, dtype=torch.long, device=counts.device)[place]


@dataclass
class _Entries:
    """What is cached in all layers, on a common length."""

    scores: Float[Tensor, "layers batch kv_heads keys"]
    positions: Int[Tensor, "layers batch kv_heads keys"]
    valid: Bool[Tensor, "layers batch kv_heads keys"]
    visual: Bool[Tensor, "layers batch kv_heads keys"]
    protected: Bool[Tensor, "layers batch kv_heads keys"]
    tiers: Int[Tensor, "layers batch kv_heads keys"] | None
    seen: Int[Tensor, " batch"]
    second: Float[Tensor, "layers batch kv_heads keys"] | None = None
    readings: Float[Tensor, "layers batch ..."] | None = None
    """What the policy's `layer_weight` read off each layer."""
    shares: Float[Tensor, "layers batch kv_heads"] | None = None


def _entries(states: Iterable[KVState], policy: Policy) -> _Entries:
    """Score layer by layer and stack."""
    rows = [_scored(state, policy) for state in states]
    longest = max(row[0].shape[-1] for row in rows)

    def stack(parts: Iterable[Tensor | None]) -> Tensor | None:
        found = [x for x in parts if x is not None]
        missing = ((x, longest - x.shape[-1]) for x in found)
        return torch.stack([F.pad(x, (0, short)) if short else x for x, short in missing]) if found else None

    *parts, readings, shares, seen = zip(*rows, strict=True)
    scores, positions, valid, visual, protected, tiers, second = (stack(part) for part in parts)
    assert scores is not None
    assert positions is not None
    assert valid is not None
    assert visual is not None
    assert protected is not None
    per_layer = (_stacked(readings), _stacked(shares))
    return _Entries(scores, positions, valid, visual, protected, tiers, seen[0], second, *per_layer)


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """One tensor for all layers, short ones filled up with 0, or none."""
    found = [x for x in parts if x is not None]
    longest = max((x.shape[-1] for x in found), default=0)
    return torch.stack([F.pad(x, (0, longest - x.shape[-1])) for x in found]) if found else None


def _scored(state: KVState, policy: Policy) -> tuple[Any, ...]:
    """What one layer brings to the decision."""
    score = policy.score(state).float()
    second = policy.second_score(state, score)
    marks = (state.positions, state.valid, state.visual, state.protected)
    extras = (policy.tiers(state), None if second is None else second.float())
    return (score, *marks, *extras, policy.layer_weight(state), policy.visual_share(state), state.seen)


def _ranking(
    entries: _Entries, config: CacheConfig, window: Int[Tensor, "layers batch kv_heads"], *, firm: bool
) -> select.Ranking:
    """Scores with what is protected (by the user, first tokens, newest tokens) and, above all else, the policy's window.

    The window of a policy is its own choice inside the budget, so it gives way to what is protected, unless `firm`.
    """
    age = entries.seen[None, :, None, None] - entries.positions
    protected = entries.protected | (entries.positions < config.sink_size) | (age <= config.recent_size)
    tiers, recent = entries.tiers, age <= window[..., None]
    if firm:
        protected = protected | recent
    elif recent.any():
        tiers = torch.zeros_like(entries.positions) if tiers is None else tiers
        tiers = torch.where(recent, tiers.amax() + 1, tiers)
    return select.Ranking(entries.scores, entries.positions, entries.valid, protected, tiers)
