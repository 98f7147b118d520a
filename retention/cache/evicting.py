"""The cache that `generate()` sees: grows like any other, then lets a policy decide what stays."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from retention.cache.config import CacheConfig
from retention.cache.decide import decide
from retention.cache.layer import EvictingLayer, tensor_bytes
from retention.cache.ledger import Ledger, PeakMeter, physical_bytes
from retention.cache.trigger import Trigger
from retention.policies import Policy
from retention.policies.collect import WINDOW
from retention.types import ModelShape


class EvictingCache(Cache):
    """All layers of one batch of sequences, evicted together at the end of a forward.

    Make one with `retention.evicting(...)`, which also installs the hooks that feed it. Not croppable.
    """

    def __init__(
        self,
        shape: ModelShape,
        layers: Iterable[CacheLayerMixin | None],
        policy: Policy,
        config: CacheConfig,
        *,
        extra_collectors: Iterable[str] = (),
        inv_freq: Float[Tensor, " frequencies"] | None = None,
    ) -> None:
        """`layers` holds transformers' own layer where it stays, None where this cache takes over."""
        counter = iter(range(10**6))
        super().__init__(layers=[EvictingLayer(self, next(counter)) if x is None else x for x in layers])
        self.shape = shape
        self.extra_collectors = tuple(extra_collectors)
        self.rope = inv_freq
        self.meter = PeakMeter()
        self.columns = self.new_tokens = 0
        self.tail_padded = False
        self.in_prompt = False
        self.staging = 0
        self.valid = torch.zeros(0, 0, dtype=torch.bool)
        self.visual = torch.zeros(0, 0, dtype=torch.bool)
        self.anchor: Int[Tensor, " batch"] | None = None
        self.expected: Int[Tensor, " batch"] | None = None
        self.evicted = False
        self.automatic = True
        self.resolved: list[int] = []
        self._configure(policy, config)

    def _configure(self, policy: Policy, config: CacheConfig) -> None:
        if config.evict_every is not None and not policy.evicts_while_decoding:
            raise ValueError(
                f"{type(policy).__name__} decides after the prompt only and has no rule for decoding; set evict_every to null"
            )
        if config.positions == "packed" and self.rope is None:
            raise ValueError(
                "positions 'packed' needs the model's rotary frequencies; open the cache with positions='packed'"
            )
        self.policy, self.config = policy, config
        self.collectors = tuple(dict.fromkeys((policy.collector, *self.extra_collectors)))
        self.inv_freq = self.rope if config.positions == "packed" else None
        self.trigger = Trigger(config.evict_every)

    @property
    def evicting_layers(self) -> list[EvictingLayer]:
        """The layers this cache manages, in order."""
        return [layer for layer in self.layers if isinstance(layer, EvictingLayer)]

    def begin(
        self,
        valid: Bool[Tensor, "batch tokens"],
        visual: Bool[Tensor, "batch tokens"],
        *,
        prompt: bool,
        padded: bool = True,
    ) -> None:
        """Told before a forward: which of its tokens are padding, which are visual, whether it is (part of) a prompt."""
        if self.columns == 0:
            self.valid, self.visual = valid[:, :0], visual[:, :0]
        if valid.shape[0] != self.valid.shape[0]:
            raise ValueError(f"the cache holds a batch of {self.valid.shape[0]}, the forward has {valid.shape[0]} rows")
        self.valid = torch.cat([self.valid, valid], 1)
        self.visual = torch.cat([self.visual, visual & valid], 1)
        self.in_prompt = prompt
        self.columns, self.new_tokens = self.columns + valid.shape[1], valid.shape[1]
        self.tail_padded = self.tail_padded or (padded and not bool(valid.all()))

    def after_forward(self) -> None:
        """Told after a forward of a prompt, a chunk of one, or a decoded token: evict if it is time to."""
        self.note_peak(self.staging)
        self.staging = 0
        if self.automatic and self.policy.evicts and self.trigger.due(self.new_tokens, prompt=self.in_prompt):
            self.evict()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """No automatic eviction inside: for questions that are asked on top of the budget."""
        before, self.automatic = self.automatic, False
        try:
            yield
        finally:
            self.automatic = before

    def observing(self) -> bool:
        """Whether collectors need this forward."""
        return self.in_prompt or (self.automatic and self.config.evict_every is not None)

    @property
    def window(self) -> int:
        """Query rows to keep: the policy's own, or as many as any fork's policy may read."""
        own = self.policy.collector == "window_rows" and "window_rows" not in self.extra_collectors
        return self.policy.observed_rows if own else WINDOW

    def accumulating(self) -> set[str]:
        """Names of statistics that survive an eviction."""
        return {"column_sums"} if "column_sums" in self.collectors else set()

    def positions(self) -> Int[Tensor, "batch columns"]:
        """Sequence index of every column, padding excluded."""
        return self.valid.long().cumsum(1) - 1

    def seen(self) -> Int[Tensor, " batch"]:
        """Tokens processed per row, padding excluded."""
        return self.valid.sum(1)

    def visual_by_position(self) -> Bool[Tensor, "batch positions"]:
        """Modality of every sequence position."""
        target = torch.where(self.valid, self.positions(), self.columns)
        table = torch.zeros(self.valid.shape[0], self.columns + 1, dtype=torch.bool, device=self.valid.device)
        return table.scatter(1, target, self.visual)

    def budgets(self) -> Int[Tensor, " batch"]:
        """The budget of each row in entries per layer and head; a fraction is of the whole prompt under way."""
        store = self.evicting_layers[0].store
        assert store.tail_keys is not None
        assert store.tail_values is not None
        width = store.tail_keys.shape[-1] + store.tail_values.shape[-1]
        entry = width * store.tail_keys.element_size() + 4 + (0 if store.tail_log_beta is None else 4)
        seen = torch.maximum(self.seen(), self.expected) if self.expected is not None else self.seen()
        self.resolved = [
            self.config.budget.resolve(
                int(n), num_layers=self.shape.num_layers, num_kv_heads=self.shape.num_kv_heads, entry_bytes=entry
            )
            for n in seen.tolist()
        ]
        return torch.tensor(self.resolved, device=self.valid.device)

    def evict(self) -> None:
        """Let the policy rank all entries now and free what exceeds the budget, in every layer at once."""
        if not self.policy.evicts:
            return
        layers = self.evicting_layers
        states = (layer.state()[0] for layer in layers)
        masks = decide(states, self.policy, self.config, self.budgets(), self.kept())
        if masks is None:
            return
        for layer, mask in zip(layers, masks, strict=True):
            state, view = layer.state()
            layer.keep(mask[..., : state.positions.shape[2]], state, view)
            self.note_peak(staging=tensor_bytes(view.keys, view.values))
            del state, view
        self.anchor, self.evicted, self.tail_padded = self.seen(), True, False

    def kept(self) -> Int[Tensor, "layers batch kv_heads"]:
        """Entries held now, padding excluded."""
        rows = []
        for layer in self.evicting_layers:
            tail = self.valid[:, self.columns - layer.store.tail : self.columns].sum(1)
            counts = torch.zeros_like(tail)[:, None] if layer.store.counts is None else layer.store.counts
            rows.append((counts + tail[:, None]).expand(-1, self.shape.num_kv_heads))
        return torch.stack(rows)

    def kept_table(self) -> Bool[Tensor, "layers batch kv_heads positions"]:
        """Whether the entry of each sequence position is held, by layer and head."""
        tables = []
        for layer in self.evicting_layers:
            state, _ = layer.state()
            slot = torch.where(state.valid, state.positions, self.columns)
            table = torch.zeros(*slot.shape[:2], self.columns + 1, dtype=torch.bool, device=slot.device)
            tables.append(table.scatter(-1, slot, True)[..., : self.columns])
        return torch.stack(tables)

    def tensors(self) -> Mapping[str, list[Tensor]]:
        """Every tensor the cache holds, by ledger item."""
        groups: dict[str, list[Tensor]] = {"layout": [self.valid, self.visual]}
        if self.anchor is not None:
            groups["layout"].append(self.anchor)
        for layer in self.layers:
            if isinstance(layer, EvictingLayer):
                parts = {**layer.store.tensors(), "statistics": list(layer.observed.values())}
            else:
                stock: Any = layer
                parts = {n: [x] for n, x in (("keys", stock.keys), ("values", stock.values)) if x is not None}
            for item, found in parts.items():
                groups.setdefault(item, []).extend(found)
        return groups

    def note_peak(self, staging: int = 0) -> None:
        """Record the bytes held now, plus transient ones."""
        self.meter.note(sum(physical_bytes(self.tensors()).values()) + staging)

    def bytes(self) -> Ledger:
        """Physical and logical bytes by item, and the peak so far."""
        entries = int(self.kept().sum()) if self.columns else 0
        store = self.evicting_layers[0].store
        keys, values = store.tail_keys, store.tail_values
        widths = [0 if x is None else x.shape[-1] * x.element_size() for x in (keys, values)]
        placed = sum(0 if x.store.positions is None else x.store.positions.numel() for x in self.evicting_layers)
        logical = {"keys": entries * widths[0], "values": entries * widths[1], "positions": placed * 4}
        logical["scores"] = 0 if store.tail_log_beta is None else entries * 4
        return Ledger(physical_bytes(self.tensors()), logical, self.meter.peak)

    def fork(self, policy: Policy | None = None, config: CacheConfig | None = None) -> "EvictingCache":
        """An independent continuation of the same prefill, with another policy or budget if given; never on hold.

        With another policy the peak starts anew from what that policy alone would hold: its own statistics
        beside the keys and values, nobody else's.
        """
        twin = copy.copy(self)
        other = policy is not None or config is not None
        needed = (policy or self.policy).collector
        if needed not in ("none", "keys_values", *self.collectors):
            raise ValueError(
                f"{type(policy).__name__} reads {needed!r}, which this cache did not collect; open it with "
                f"extra_collectors=({needed!r},)"
            )
        if self.evicted and self.inv_freq is None and config is not None and config.positions == "packed":
            raise ValueError("entries were evicted at original positions already; a fork cannot make them packed")
        twin.meter = PeakMeter() if other else copy.copy(self.meter)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        for layer in twin.evicting_layers:
            layer.owner, layer.store, layer.observed = twin, copy.copy(layer.store), dict(layer.observed)
        twin.extra_collectors, twin.automatic = (), True
        twin._configure(policy or self.policy, config or self.config)
        twin.trigger.since_eviction = self.trigger.since_eviction
        for layer in twin.evicting_layers:
            layer.forget_unused(keep_gate="gate" in twin.collectors)
        twin.note_peak()
        return twin

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams, in all layers and in what rows share."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # any integer tensor will do
        self._select_shared(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.reorder_cache(torch.arange(self.valid.shape[0], device=self.valid.device).repeat_interleave(repeats))

    def _select_shared(self, rows: Tensor) -> None:
        self.valid, self.visual = self.valid[rows], self.visual[rows]
        self.anchor = None if self.anchor is None else self.anchor[rows]
        self.expected = None if self.expected is None else self.expected[rows]

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: evicted entries cannot come back."""
        self.evicting_layers[0].crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything; the policy and its configuration stay."""
        super().reset()
        self.columns = self.new_tokens = 0
        self.valid, self.visual, self.tail_padded = self.valid.new_empty(0, 0), self.visual.new_empty(0, 0), False
        self.anchor, self.expected, self.evicted, self.meter = None, None, False, PeakMeter()
        self._configure(self.policy, self.config)
