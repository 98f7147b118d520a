"""A second cache that continues the same prefill by itself; buffers are shared until one of the two writes."""

import copy
from typing import TYPE_CHECKING

from retention.cache.config import CacheConfig
from retention.cache.layer import EvictingLayer
from retention.cache.ledger import PeakMeter
from retention.policies import Policy

if TYPE_CHECKING:
    from retention.cache.evicting import EvictingCache


def fork_cache(cache: "EvictingCache", policy: Policy | None, config: CacheConfig | None) -> "EvictingCache":
    """What `EvictingCache.fork` gives."""
    twin = copy.copy(cache)
    other = policy is not None or config is not None
    reads = (policy or cache.policy).collectors
    needed = next((x for x in reads if x not in ("none", "keys_values", *cache.collectors)), None)
    if needed is not None:
        raise ValueError(
            f"{type(policy).__name__} reads {needed!r}, which this cache did not collect; open it with "
            f"extra_collectors=({needed!r},)"
        )
    if cache.evicted and not cache.packs and config is not None and config.positions == "packed":
        raise ValueError("entries were evicted at original positions already; a fork cannot make them packed")
    twin.meter = PeakMeter() if other else copy.copy(cache.meter)
    twin.layers = [
        copy.copy(layer) if isinstance(layer, EvictingLayer) else copy.deepcopy(layer) for layer in cache.layers
    ]
    for layer in twin.evicting_layers:
        layer.owner, layer.store, layer.observed = twin, layer.store.fork(), dict(layer.observed)
    twin.rotation = None if cache.rotation is None else cache.rotation.fork()
    twin.tokens = cache.tokens.fork()
    twin.extra_collectors, twin.automatic = (), True
    twin.configure(policy or cache.policy, config or cache.config)
    twin.trigger.since_eviction = cache.trigger.since_eviction
    for layer in twin.evicting_layers:
        layer.forget_unused(keep_gate="gate" in twin.collectors)
    twin.note_peak()
    return twin
