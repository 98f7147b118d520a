"""Other gates for one conversation: several sets on one attached model, each cache scored by its own."""

from retention.cache.evicting import EvictingCache
from retention.gates import RetentionGates


def use_gates(cache: EvictingCache, gates: RetentionGates) -> EvictingCache:
    """Let these gates score what a cache is fed, here and in its forks; returns the cache.

    Meant for an empty fork of a cache that `evicting` opened with other gates of the same base.

    Raises:
        ValueError: when the cache was opened without gates or holds tokens already, whose scores do not compare, or
            these gates are of another base, objective or kind of memory.
    """
    if cache.gates is None or "gate" not in cache.collectors:
        raise ValueError("expected a cache that gates score, got one without; open it with evicting(..., gates=...)")
    if cache.columns:
        raise ValueError(
            f"expected an empty cache, got one of {cache.columns} tokens scored by other gates; fork one first"
        )
    gates.check_beside(cache.gates)
    if cache.policy.gates_of is not None and gates.training_record:
        gates.check_objective(cache.policy.gates_of, type(cache.policy).__name__)
    if cache.memory is cache.gates.memory:
        ours, theirs = (None if x is None else x.config.to_dict() for x in (cache.memory, gates.memory))
        if ours != theirs:
            raise ValueError(f"expected gates with memory {ours}, as the cache was opened, got {theirs}; open another")
        cache.memory = gates.memory
    cache.gates = gates
    return cache
