"""Who stays: a policy's scores, an allocator's counts and a selector, brought together for all layers at once."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from retention.budget import ALLOCATORS, AllocationInput, Pool
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
) -> Bool[Tensor, "layers batch kv_heads keys"] | None:
    """Score, allocate, select; None when everything fits. `states` is read once, one layer at a time."""
    table = None if config.quota is None else torch.tensor(config.quota, device=available.device)
    counts = ALLOCATORS[config.allocator or policy.allocator](budgets, AllocationInput(available, table))
    selector = _selector(policy, config, counts)
    exceeds = available.sum((0, 2)) > counts.totals if isinstance(counts, Pool) else (available > counts)
    if selector != "threshold" and not exceeds.any():
        return None
    ranking = _ranking(states, policy, config, _recent(policy, config, budgets, counts))
    if selector == "threshold":
        assert config.threshold is not None
        return select.keep_threshold(ranking, config.threshold)
    if isinstance(counts, Pool):
        return select.keep_global(ranking, counts.totals, min_per_head=config.min_per_head)
    return (select.keep_per_layer if selector == "layer" else select.keep_per_head)(ranking, counts)


def _selector(policy: Policy, config: CacheConfig, counts: Tensor | Pool) -> str:
    """The selector in force: an allocator that was overridden brings the selector it needs."""
    if config.selector is not None:
        chosen = config.selector
    elif isinstance(counts, Pool):
        chosen = "global"
    else:
        chosen = "head" if policy.selector == "global" else policy.selector
    if chosen != "threshold" and (chosen == "global") != isinstance(counts, Pool):
        raise ValueError(
            f"selector {chosen!r} and allocator {config.allocator or policy.allocator!r} do not fit: the global "
            "selector needs the global allocator, and the other way round"
        )
    return chosen


def _recent(
    policy: Policy, config: CacheConfig, budgets: Int[Tensor, " batch"], counts: Tensor | Pool
) -> Int[Tensor, "layers batch kv_heads"]:
    """Newest entries each head keeps: the configured number or the policy's share of the head's own count."""
    counts = budgets[None, :, None] if isinstance(counts, Pool) else counts
    values, place = counts.unique(return_inverse=True)
    table = [max(config.recent_size, policy.recent(value)) for value in values.tolist()]
    return torch.tensor(table, device=counts.device)[place]


def _ranking(
    states: Iterable[KVState], policy: Policy, config: CacheConfig, recent: Int[Tensor, "layers batch kv_heads"]
) -> select.Ranking:
    """Scores of all layers on a common length, with what is protected."""
    rows = [
        (s.positions, s.valid, policy.score(s).float().masked_fill(~s.valid, 0.0), policy.tiers(s), s.seen)
        for s in states
    ]
    longest = max(row[0].shape[-1] for row in rows)

    def stack(parts: Iterable[Tensor]) -> Tensor:
        return torch.stack([F.pad(x, (0, longest - x.shape[-1])) for x in parts])

    places, present, scores, tiers, seen = zip(*rows, strict=True)
    positions, valid = stack(places), stack(present)
    newest = seen[0][None, :, None, None] - recent[..., None]
    protected = (positions < config.sink_size) | (positions >= newest)
    levels = None if tiers[0] is None else stack(t for t in tiers if t is not None)
    return select.Ranking(stack(scores), positions, valid, protected & valid, levels)
