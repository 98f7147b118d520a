"""Who stays: a policy's scores, an allocator's counts and a selector, brought together for all layers at once."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from retention.budget import ALLOCATORS, AllocationInput, Pool, Split
from retention.cache.config import CacheConfig
from retention.ops import select
from retention.policies import Policy
from retention.types import KVState


def decide(
    states: Iterable[KVState],
    policy: Policy,
    config: CacheConfig,
    budgets: Int[Tensor, " batch"],
    available: Int[Tensor, "layers batch kv_heads"],
    *,
    only: int | None = None,
) -> Bool[Tensor, "some_layers batch kv_heads keys"] | None:
    """Score, allocate, select; None when everything fits. `states` is read once, one layer at a time.

    With `only`, `states` holds that layer alone and it is decided alone: see `decides_by_layer`.

    Raises:
        ValueError: when selector and allocator do not fit, or protected entries alone exceed the budget.
    """
    name = config.allocator or policy.allocator
    selector = _selector(policy, config, name)
    given, entries = _given(policy, config, budgets, available), None
    if name == "modality":
        if not (available > budgets[None, :, None]).any():
            return None
        entries = _entries(states, policy)
        given.available = available if only is None else available[only : only + 1]
        given.available_visual = (entries.visual & entries.valid).sum(-1)
    counts = ALLOCATORS[name](budgets, given)
    if selector != "threshold" and _fits(available, counts):
        return None
    entries = entries or _entries(states, policy)
    if only is not None and isinstance(counts, Tensor):
        counts = counts[only : only + 1]
    window = _window(policy, _of_head(counts, budgets))
    ranking = _ranking(entries, config, window, firm=selector == "threshold")
    if selector == "threshold":
        assert config.threshold is not None
        return select.keep_threshold(ranking, config.threshold)
    if isinstance(counts, Pool):
        return select.keep_global(ranking, counts.totals, min_per_head=config.min_per_head)
    if isinstance(counts, Split):
        return select.keep_by_modality(ranking, entries.visual, counts.visual, counts.text)
    return (select.keep_per_layer if selector == "layer" else select.keep_per_head)(ranking, counts)


def decides_by_layer(policy: Policy, config: CacheConfig) -> bool:
    """Whether what a layer keeps depends on no other layer's scores, so that it may be evicted before they ran."""
    allocator = config.allocator or policy.allocator
    return _selector(policy, config, allocator) != "global"


def _selector(policy: Policy, config: CacheConfig, allocator: str) -> str:
    """The selector in force: an allocator that was overridden brings the selector it needs."""
    needed = {"global": "global", "modality": "head"}.get(allocator)
    default = needed or ("head" if policy.selector == "global" else policy.selector)
    chosen = config.selector or default
    if allocator == "modality" and chosen != "head":
        raise ValueError(
            f"selector {chosen!r} and allocator 'modality' do not fit: visual and text entries are counted inside "
            "each head; use selector 'head', or another allocator"
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
        visual_share=config.visual_share,
    )


def _fits(available: Int[Tensor, "layers batch kv_heads"], counts: Tensor | Pool | Split) -> bool:
    """Whether nothing has to leave."""
    if isinstance(counts, Pool):
        return not (available.sum((0, 2)) > counts.totals).any()
    return not (available > (counts.visual + counts.text if isinstance(counts, Split) else counts)).any()


def _of_head(counts: Tensor | Pool | Split, budgets: Int[Tensor, " batch"]) -> Int[Tensor, "layers batch kv_heads"]:
    """Entries that each head may count on; in a pool the average."""
    if isinstance(counts, Pool):
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


def _entries(states: Iterable[KVState], policy: Policy) -> _Entries:
    """Score layer by layer and stack."""
    rows = [
        (policy.score(s).float(), s.positions, s.valid, s.visual, s.protected, policy.tiers(s), s.seen) for s in states
    ]
    longest = max(row[0].shape[-1] for row in rows)

    def stack(parts: Iterable[Tensor]) -> Tensor:
        missing = ((x, longest - x.shape[-1]) for x in parts)
        return torch.stack([F.pad(x, (0, short)) if short else x for x, short in missing])

    *parts, tiers, seen = zip(*rows, strict=True)
    scores, positions, valid, visual, protected = (stack(part) for part in parts)
    levels = None if tiers[0] is None else stack(t for t in tiers if t is not None)
    return _Entries(scores, positions, valid, visual, protected, levels, seen[0])


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
