"""What a cache will cost, before anything runs: bytes of the full and the evicted cache, and the largest batch."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from retention.budget import Budget
from retention.cache.config import REMEMBER, CacheConfig
from retention.memory import MemoryConfig, NoMemory, RetentionMemory
from retention.planning.held import Held, Setting
from retention.planning.sizes import Sizes, sizes_of
from retention.policies import POLICIES
from retention.types import require

if TYPE_CHECKING:
    from retention.planning.sizes import Source

RESERVE = 0.1
"""Part of a device's memory left to activations and what the allocator loses, unless told otherwise."""


@dataclass
class Plan:
    """What the caches of a batch cost."""

    sizes: Sizes
    context: int
    batch: int
    budget: Budget
    policy: str
    memory: str
    entries: int
    """Entries per layer and head that the budget buys."""
    full: Held
    evicted: Held
    per_token: int
    """Bytes that every decoded token adds, until decoding evicts."""
    slack: int
    """Bytes that decoding reserves at most for tokens to come, uneven heads padded."""
    device_memory: int | None
    largest: dict[str, int]
    """Largest batch by cache, `full` and `evicted`, where a device's memory was named and the weights are known."""


def plan(
    source: "Source",
    context: int,
    batch: int = 1,
    budget: Budget | str | float = "10%",
    *,
    policy: str = "db_trim_kv",
    memory: MemoryConfig | None = None,
    on_evict: str = "memory",
    prefill_chunk: int | None = None,
    dtype: torch.dtype | None = None,
    device_memory: int | None = None,
    reserve: float = RESERVE,
    weights: int | None = None,
) -> Plan:
    """What the cache of `batch` prompts of `context` tokens each will hold, full and evicted.

    `source` is a model, its config, or a `config.json` (or its folder); nothing is downloaded, no weight is read.
    `memory` is one of evicted tokens, used as `on_evict` says. With `device_memory` in bytes the largest
    batch is the one whose weights and cache, at their peak, leave `reserve` of it free: activations are not counted.
    `weights` are their bytes, which a quantised model's config does not tell.

    Bytes are those of `cache.bytes()` right after the prompt: exact where heads keep equally many, and in a pool but
    for its page numbers. Peaks are exact for full-attention models evicted head by head, otherwise at most so much,
    but for the padding of uneven heads between chunks. Layers with a window count as after the next token, when
    transformers lets go of the rest of the prompt. Not planned: what policies observe (attention rows, sums),
    packed positions, prompts of unequal lengths.

    Raises:
        ValueError: for settings that do not fit, or a model whose cache is something else.
    """
    checks = (
        (context >= 1 and batch >= 1, "context and batch of at least 1", (context, batch)),
        (policy in POLICIES, f"policy among {', '.join(POLICIES)}", policy),
        (0 <= reserve < 1, "reserve of 0 or more, below 1", reserve),
        (device_memory is None or device_memory > 0, "device_memory above 0 bytes", device_memory),
        (weights is None or weights > 0, "weights above 0 bytes", weights),
        (memory is None or on_evict in REMEMBER, f"on_evict among {', '.join(REMEMBER)} with a memory", on_evict),
    )
    require(checks)
    sizes = sizes_of(source, dtype)
    sizes = sizes if weights is None else replace(sizes, weights=weights)
    if not sizes.shape.layers:
        raise ValueError("expected a model with full-attention layers, got one whose cache does not grow")
    wanted = budget if isinstance(budget, Budget) else Budget.parse(str(budget))
    remembers = memory is not None and not isinstance(memory, NoMemory)
    setting = Setting(
        sizes,
        context,
        POLICIES[policy](),
        CacheConfig(wanted, prefill_chunk=prefill_chunk, on_evict=on_evict if remembers else None),
        RetentionMemory(memory, sizes.shape) if memory is not None and remembers else None,
    )
    full, evicted, heads = (
        setting.held(batch, evicted=False),
        setting.held(batch, evicted=True),
        sizes.shape.num_kv_heads,
    )
    cells = batch * heads * len(sizes.shape.layers)
    return Plan(
        sizes,
        context,
        batch,
        wanted,
        policy,
        memory.name if memory is not None and remembers else "none",
        min(setting.entries(), context),
        full,
        evicted,
        cells * (sizes.entry + setting.scored),
        cells * setting.spare() * (sizes.entry + setting.scored),
        device_memory,
        {} if device_memory is None else _largest(setting, device_memory * (1 - reserve)),
    )


def _largest(setting: Setting, room: float) -> dict[str, int]:
    """Largest batch whose peak fits beside the weights; 0 where one sequence does not."""
    if setting.sizes.weights is None:
        raise ValueError(
            "expected the bytes of the weights, which need room too and which this config does not tell (quantised, or no "
            "model of transformers); name them (--weights 5GiB)"
        )
    found = {}
    for name, evicted in (("full", False), ("evicted", True)):
        one, two = (setting.held(batch, evicted=evicted).peak for batch in (1, 2))
        left = room - setting.sizes.weights - (2 * one - two)  # what does not grow with the batch
        found[name] = max(0, int(left // (two - one)))
    return found


__all__ = ["Held", "Plan", "plan"]
