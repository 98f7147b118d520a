"""What a run holds its caches to, and what its manifest says of its rows: nothing over its budget, which questions."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from retention.cache.evicting import EvictingCache
from retention.data.example import Example

Row = dict[str, Any]


def check_kept(name: str, cache: EvictingCache, examples: Sequence[Example], *, newer: int = 0) -> None:
    """Whether an arm's cache holds at most its budget, summed over layers and heads, in every row.

    `newer` are tokens per head that may have come since the last eviction. A threshold has no count to keep to; a pyramid
    of whole-number steps (`cache.integer_floor`) may miss its total by these, but not keep everything.

    Raises:
        RuntimeError: where a row holds more, or a context beyond the budget was not evicted at all.
    """
    if not cache.policy.evicts or (cache.config.selector or cache.policy.selector) == "threshold":
        return
    heads = cache.shape.num_layers * cache.shape.num_kv_heads
    found = zip(examples, cache.kept().sum((0, 2)).tolist(), cache.seen().tolist(), cache.resolved, strict=True)
    for example, kept, seen, budget in found:
        allowed = (budget + newer) * heads
        if kept > allowed and (kept == seen * heads or not cache.config.integer_floor):
            what = "evicted nothing of" if kept == seen * heads else "kept too much of"
            raise RuntimeError(
                f"{name} {what} {example.id}: expected at most {allowed} entries ({budget} per layer and head), got {kept}; "
                "mend the policy or its allocator, nothing of this batch was counted"
            )


def questions_hash(rows: Iterable[Row]) -> str:
    """SHA-256 of all questions with their answers, each once, in the order of tasks, contexts and turns."""
    told = {
        (row["task"], row["seed_data"], row["example_id"], row["turn"], row["question"], str(row["answer"]))
        for row in rows
    }
    return hashlib.sha256(json.dumps(sorted(told)).encode()).hexdigest()


def over_budget(rows: Iterable[Row]) -> int:
    """Rows whose cache held more entries after the eviction of the context than the budget gives all layers and heads.

    Only what `check_kept` lets pass can be among them: thresholds and rounded pyramids.
    """
    told = [row for row in rows if row["error"] is None and row["seen"]]
    return sum(row["kept"] > row["budget"]["resolved"] * (row["entries_full"] // row["seen"]) for row in told)
