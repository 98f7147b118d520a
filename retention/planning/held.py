"""Bytes of a cache after a prompt and at its peak, computed from sizes and settings alone."""

from dataclasses import dataclass

from retention.cache.config import CacheConfig
from retention.cache.decide import decides_by_layer
from retention.cache.ledger import ITEMS
from retention.cache.worth import entries_bought
from retention.memory import RetentionMemory
from retention.ops.ragged import PAGE
from retention.planning.sizes import FULL, LINEAR, Sizes
from retention.policies import Policy

POSITION, SCORE, COUNT = 4, 4, 8
"""Bytes beside an entry: its position, what a gate said of it; and of a head's number of entries."""


@dataclass
class Held:
    """A cache after a prompt, by ledger item."""

    items: dict[str, int]
    by_kind: dict[str, int]
    """Of each kind of layer, all items but `layout`."""
    peak: int
    """Most bytes at once while the prompt is read."""

    @property
    def total(self) -> int:
        """Bytes held."""
        return sum(self.items.values())


@dataclass
class Setting:
    """Everything but the batch."""

    sizes: Sizes
    context: int
    policy: Policy
    config: CacheConfig
    memory: RetentionMemory | None

    @property
    def scored(self) -> int:
        """Bytes that a gate's output takes for an entry."""
        return SCORE if "gate" in self.policy.collectors else 0

    @property
    def on_evict(self) -> str:
        """What becomes of entries that leave."""
        return self.config.on_evict or self.policy.on_evict

    @property
    def state(self) -> int:
        """Bytes of a sequence's memory, all layers."""
        return 0 if self.memory is None else self.memory.state_bytes()

    def entries(self) -> int:
        """Entries per layer and head, as the cache resolves them."""
        entry = self.sizes.entry + POSITION + self.scored
        return entries_bought(self.config.budget, self.context, self.sizes.shape, entry, self.state, self.on_evict)

    def held(self, batch: int, *, evicted: bool) -> Held:
        """The cache of a batch of equally long prompts after them; sliding layers as after the next token."""
        sizes, context = self.sizes, self.context
        kept = self.entries() if evicted else context
        evicts, scored = kept < context and self.policy.evicts, self.scored if evicted else 0
        kept = kept if evicts else context
        heads = batch * sizes.shape.num_kv_heads
        cells = sizes.count(FULL) * heads
        items = dict.fromkeys(ITEMS, 0)
        items["keys"] = items["values"] = cells * kept * sizes.entry // 2
        items["scores"], items["positions"] = cells * kept * scored, cells * kept * POSITION * evicts
        items["memory"] = batch * self.state * evicts
        items["layout"] = context + 3 * batch * context + cells * COUNT * evicts
        if evicts and self.memory is not None and self.memory.config.placed:
            items["layout"] += 8 * batch * context
        kinds = dict.fromkeys(sizes.kinds, 0)
        others = {kind: sizes.count(kind) * batch * sizes.outside(kind, context) for kind in kinds if kind != FULL}
        items["outside"] = sum(others.values())
        by_kind = others | {FULL: sum(items[x] for x in ("keys", "values", "scores", "positions", "memory"))}
        read = context if self.config.prefill_chunk is None else sizes.window + self.config.prefill_chunk
        whole = {
            kind: sizes.count(kind) * heads * min(context, read) * sizes.entry for kind in others if kind != LINEAR
        }
        growth = sum(whole.values()) - sum(others[kind] for kind in whole)
        return Held(items, {k: by_kind[k] for k in kinds}, sum(items.values()) + growth + self._extra(heads, kept))

    def _extra(self, heads: int, kept: int) -> int:
        """What full layers hold at the worst moment beside what stays: entries that are about to leave."""
        if kept >= self.context:
            return 0
        chunk = self.config.prefill_chunk
        each = self.sizes.entry + self.scored
        before = self.context if chunk is None else min(self.context, kept + chunk)
        if decides_by_layer(self.policy, self.config):
            old = 0 if chunk is None else kept * POSITION
            return heads * (before * each + old)
        layers, after = self.sizes.count(FULL), kept * (each + POSITION) + COUNT
        first = min(layers * kept, before) * (each + POSITION) + COUNT  # the first layer may win most of the pool
        return heads * (layers * (before * each - after) + first)

    def spare(self) -> int:
        """Entries per head that decoding reserves at most right after the prompt.

        That is a sixteenth of the longest head, and in a pool what pads heads to the longest behind their pages.
        """
        kept, pool = min(self.entries(), self.context), not decides_by_layer(self.policy, self.config)
        if kept == self.context or not self.policy.evicts:
            return max(16, self.context // 16)
        shape = self.sizes.shape
        longest = min(self.context, kept * shape.num_layers * shape.num_kv_heads) if pool else kept
        return max(16, longest // 16) + (min(PAGE, longest) if pool else 0)
