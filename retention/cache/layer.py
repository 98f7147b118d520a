"""One layer of an evicting cache, behind transformers' cache-layer interface."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from retention.cache import recall
from retention.cache.config import REMEMBER
from retention.cache.delayed import settle, shifted
from retention.cache.evicted import merged
from retention.cache.rotation import Turn
from retention.cache.storage import Entries, LayerStorage
from retention.memory import MemoryLayer, State
from retention.models.versions import GrowingLayer
from retention.ops.decay import log_beta_at
from retention.policies.collect import COLLECTORS, Observation, statistics_of
from retention.types import KVState

if TYPE_CHECKING:
    from retention.cache.evicting import EvictingCache


def tensor_bytes(*tensors: Tensor) -> int:
    """Bytes of the elements of some tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


class EvictingLayer(GrowingLayer):
    """One layer's storage behind transformers' cache-layer interface; lengths are tokens seen, not tokens kept."""

    def __init__(self, owner: "EvictingCache", number: int) -> None:
        super().__init__()
        self.owner, self.number = owner, number
        self.recalled: State = {}
        """State of the memory of what left; empty before the first eviction and without a memory."""
        self.scaling = 1.0
        """Of the attention logits, noted at every call."""
        self.store = LayerStorage()
        self.length = 0
        self.staged: Tensor | None = None
        self.heard: Tensor | None = None
        """Sum of the attention inputs of all text so far, where the gates listen to it."""
        self.observed: dict[str, Tensor] = {}
        self.seen_by: Bool[Tensor, "batch 1 queries keys"] | None = None
        """The model's own mask of the call under way, where it is more than causal."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: storage takes the first tensors as they are."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def stage(self, log_beta: Float[Tensor, "batch kv_heads tokens ..."], *, delayed: bool = False) -> None:
        """Gate outputs of the tokens of the next `update`; a delayed one is about the token before its own."""
        if delayed:
            valid, count = self.owner.tokens.valid, log_beta.shape[2]
            before, log_beta = shifted(log_beta, valid[:, -count:])
            settle(self.store, valid[:, :-count], before)
        self.staged = log_beta

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values, and return them: attention reads the rest from the storage.

        Raises:
            RuntimeError: outside the block that opened the cache, where attention would not find the rest.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.length + key_states.shape[2]
        if length != self.owner.columns:
            raise RuntimeError(
                "an evicting cache works inside the `with retention.evicting(model, ...)` block of its model only; "
                "open one and feed the cache there"
            )
        self.length = length
        staged, self.staged = self.staged, None
        if self.store.append(key_states, value_states, staged, self._spare(key_states.shape[2])):
            self.owner.changed = True
        return key_states, value_states

    def _spare(self, new: int) -> int:
        """Room to make for tokens after these: none for prompts, a sixteenth of what is held while decoding."""
        if new > 1:
            return 0
        spare = max(16, (self.store.longest + self.store.tail) // 16)
        every = self.owner.trigger.evict_every
        return spare if every is None else min(spare, every)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values padded to the longest head, for attention calls of several queries."""
        keys, values = self.store.view()
        if not self.store.uniform:
            self.owner.staging = max(self.owner.staging, tensor_bytes(keys, values))
        return keys, values

    def visible(self, queries: int) -> Bool[Tensor, "batch kv_heads queries keys"]:
        """Which keys of the padded view the last `queries` tokens may see: kept ones, the tail up to themselves."""
        store, tail = self.store, self.store.tail
        valid = self.owner.tokens.valid[:, self.owner.columns - tail : self.owner.columns]
        rows = torch.arange(tail - queries, tail, device=valid.device)[:, None]
        steps = torch.arange(tail, device=valid.device)
        causal = (((steps <= rows) & valid[:, None]) | (steps == rows))[:, None]
        if self.seen_by is not None:
            causal = self.seen_by[:, :, -queries:, -tail:]
        causal = causal.expand(-1, self.owner.shape.num_kv_heads, -1, -1)
        if not store.longest:
            return causal
        kept = store.kept_valid()[:, :, None].expand(-1, -1, queries, -1)
        return torch.cat([kept, causal], -1)

    @contextmanager
    def seeing(self, mask: Bool[Tensor, "batch 1 queries keys"] | None) -> Iterator[None]:
        """Inside, tokens of the tail see each other as this mask says instead of causally."""
        self.seen_by = mask
        try:
            yield
        finally:
            self.seen_by = None

    def attention_mask(self, queries: int, groups: int) -> Bool[Tensor, "batch heads queries keys"]:
        """`visible` for every query head."""
        return self.visible(queries).repeat_interleave(groups, 1)

    def buffer_valid(self) -> Bool[Tensor, "batch columns"] | None:
        """False where a column of the buffer is padding; None where none is. The newest token always sees itself."""
        if not self.owner.tail_padded:
            return None
        valid = self.owner.tokens.valid[:, self.owner.columns - self.store.tail : self.owner.columns].clone()
        valid[:, -1] = True
        return F.pad(valid, (self.store.front, 0), value=True)

    def buffer_visible(self) -> Bool[Tensor, "batch kv_heads_or_1 columns"] | None:
        """Which columns of the buffer the newest token may see, neither padding nor holes; None for all of them."""
        valid, holes = self.buffer_valid(), self.store.holes()
        if holes is None:
            return None if valid is None else valid[:, None]
        seen = torch.arange(self.store.buffers[0].used, device=holes.device) >= holes[..., None]
        return seen if valid is None else seen & valid[:, None]

    def observe(self, call: Observation) -> None:
        """Let the active collectors look at this attention call; queries that are padding observe nothing."""
        tokens, count = self.owner.tokens, call.queries.shape[2]
        valid, visual = tokens.valid[:, -count:], tokens.visual[:, -count:]
        call = replace(call, valid=valid, visual=visual, seen_visual=tokens.visual[:, :-count].any(1))
        call = replace(call, visual_keys=lambda: self.state().visual)
        if self.owner.tail_padded:
            call = replace(call, visible=call.visible & valid[:, None, :, None])
        for name in self.owner.collectors:
            collector = COLLECTORS[name]
            if collector is None:
                continue
            for key, new in collector.observe(call).items():
                old = self.observed.get(key)
                if old is not None:
                    old = F.pad(old, (0, new.shape[-1] - old.shape[-1]))
                    if collector.accumulates:
                        new = new + old
                    elif collector.rolls and not self.owner.starts:
                        new = torch.cat([old, new], 2)[:, :, -call.window :]
                self.observed[key] = new

    def forget_unused(self, *, keep_gate: bool) -> None:
        """Free what the policy in force does not read: other policies' statistics, gate outputs."""
        names = statistics_of(self.owner.collectors)
        self.observed = {k: v for k, v in self.observed.items() if k in names}
        for name in statistics_of(self.owner.collectors, rolling=True) & set(self.observed):
            self.observed[name] = self.observed[name][:, :, -self.owner.window :].clone()
        if not keep_gate:
            self.store.log_beta, self.heard = None, None
            if self.store.entries is not None:
                self.store.entries = replace(self.store.entries, log_beta=None)

    def state(self) -> KVState:
        """Everything a policy may look at."""
        store, cache, known = self.store, self.owner, self.store.entries
        shape = (cache.tokens.valid.shape[0], cache.shape.num_kv_heads, store.tail)
        tail = slice(cache.columns - store.tail, cache.columns)
        positions = cache.tokens.positions()[:, None, tail].expand(shape)
        valid = cache.tokens.valid[:, None, tail].expand(shape)
        if store.longest and known is not None:
            positions = torch.cat([store.padded(known.positions).long(), positions], -1)
            valid = torch.cat([store.kept_valid(), valid], -1)
        evidence = cache.tokens.answering(positions)
        allowed = (cache.tokens.allowance(self.number), cache.tokens.suffix(positions)) if cache.policy.steps else ()
        visual, protected = cache.tokens.marks(positions, text=cache.config.protect_text)
        length = store.longest + store.tail
        statistics = {k: F.pad(v, (0, length - v.shape[-1])) for k, v in self.observed.items()}
        return KVState(
            self.read,
            positions,
            valid,
            visual & valid,
            protected & valid,
            cache.seen(),
            self._log_beta(),
            statistics,
            self.number,
            None if evidence is None else evidence & valid,
            cache.shape.num_layers,
            cache.tokens.looked,
            *allowed,
        )

    def _log_beta(self) -> Float[Tensor, "batch kv_heads keys"] | None:
        """Of all entries; of gates that read the budget, at the one in force."""
        stored, gates = self.store.gate_outputs(), self.owner.gates
        if stored is None or stored.dim() == 3:
            return stored
        return log_beta_at(stored, None if gates is None else gates.config.coordinate(self.owner.budgets()))

    def keep(self, mask: Bool[Tensor, "batch kv_heads keys"], *, spare: int = 0) -> None:
        """Drop what the mask does not name; re-rotate what stays where positions are packed."""
        state = self.state()
        coordinates, turn = self._pack(mask) if self.owner.packs else (None, None)
        accumulated = {k: v for k, v in state.statistics.items() if k in self.owner.accumulating()}
        flat = {k: v.movedim(-1, 2)[mask] for k, v in accumulated.items()}
        memory = self.memory
        if memory is not None:
            places = self.owner.tokens.patches(state.positions)
            self.recalled = recall.absorb(memory, self.recalled, state, mask, self.owner.policy, self.scaling, places)
        stored = self.store.gate_outputs()
        log_beta = None if stored is None else stored[mask]
        self.store.keep(
            mask, Entries(state.positions[mask].int(), log_beta, coordinates), turn, spare, self._merged(state, mask)
        )
        kept = {k: self.store.padded(v).movedim(2, -1) for k, v in flat.items()} if self.store.longest else {}
        self.observed = kept

    @property
    def memory(self) -> MemoryLayer | None:
        """The memory that evicted entries flow into, if the cache has one in force."""
        owner = self.owner
        return owner.memory.layer(self.number) if owner.memory is not None and owner.on_evict in REMEMBER else None

    def _merged(self, state: KVState, mask: Bool[Tensor, "batch kv_heads keys"]) -> tuple[Tensor, Tensor] | None:
        """Keys and values of what stays with what leaves merged into it, where the cache merges."""
        if self.owner.on_evict != "merge":
            return None
        contents = merged(state.keys, state.values, mask, state.valid & ~mask, self.owner.config.merge, state.positions)
        self.owner.staging = max(self.owner.staging, tensor_bytes(*contents))
        return contents

    def _pack(self, mask: Bool[Tensor, "batch kv_heads keys"]) -> tuple[Tensor, Turn]:
        """New rotary coordinates of what the mask keeps, and how to turn its keys there."""
        store, cache = self.store, self.owner
        assert cache.rotation is not None
        known = None if store.entries is None else store.entries.coordinates
        kept = store.padded(known.T).movedim(-1, 0) if known is not None and store.longest else None
        tail = cache.tokens.positions()[:, None, cache.columns - store.tail :].expand(-1, mask.shape[1], -1)
        positions = F.pad(tail, (store.longest, 0))
        return cache.rotation.pack(kept, positions, cache.seen(), mask)

    def tensors(self) -> dict[str, list[Tensor]]:
        """Everything the layer holds, by ledger item."""
        heard = [] if self.heard is None else [self.heard]
        own: dict[str, list[Tensor]] = {
            "statistics": [*self.observed.values(), *heard],
            "memory": list(self.recalled.values()),
        }
        return {**own, **self.store.tensors()}

    def get_seq_length(self) -> int:
        """Tokens processed, padding included: what drives positions."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the stock mask: the columns of the tail and the new tokens."""
        return self.store.tail + query_length, self.length - self.store.tail

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: evicted entries cannot come back."""
        raise NotImplementedError(
            "an evicting cache cannot be cropped, because evicted entries cannot be rolled back; switch off assisted "
            "and prompt-lookup decoding, or use the full cache"
        )

    def reset(self) -> None:
        """Forget everything."""
        self.store, self.length, self.staged, self.observed, self.recalled = LayerStorage(), 0, None, {}, {}
        self.heard = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams; the owner reorders what rows share."""
        rows = beam_idx.to(self.owner.tokens.valid.device)
        self.store.select_rows(rows)
        self.observed = {k: v[rows] for k, v in self.observed.items()}
        self.recalled = {k: v[rows] for k, v in self.recalled.items()}
        self.heard = None if self.heard is None else self.heard[rows]
