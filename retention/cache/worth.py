"""What a budget buys: entries per layer and head, with or without a memory to pay for."""

from retention.budget import Budget
from retention.cache.config import REMEMBER
from retention.types import ModelShape


def entries_bought(
    budget: Budget, seen: int, shape: ModelShape, entry_bytes: int, state_bytes: int, on_evict: str
) -> int:
    """Entries per layer and KV head for a context of `seen` tokens, at least 1.

    `entry_bytes`: of key, value and what is stored beside them; `state_bytes`: of a memory's state, all layers of a
    sequence. A budget in bytes always pays for the state of a memory. Otherwise `memory_paid` takes its worth out of
    the entries, rounded up, and `refund` adds it to them, rounded down.
    """
    bought = budget.resolve(
        seen,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        entry_bytes=entry_bytes,
        state_bytes=state_bytes if on_evict in REMEMBER else 0,
    )
    each = entry_bytes * shape.num_layers * shape.num_kv_heads
    worth = {"memory_paid": -(-state_bytes // each), "refund": -(state_bytes // each)}.get(on_evict, 0)
    return bought if budget.unit == "bytes" else max(1, bought - worth)
