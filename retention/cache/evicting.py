"""The cache that `generate()` sees: grows like any other, then lets a policy decide what stays."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import Cache

from retention.cache.config import REMEMBER, CacheConfig, check_policy
from retention.cache.decide import Curve, decide, decides_by_layer, drop_one
from retention.cache.fork import fork_cache
from retention.cache.inputs import Reader, states
from retention.cache.layer import EvictingLayer, tensor_bytes
from retention.cache.ledger import Ledger, PeakMeter, logical_bytes, physical_bytes, stock_tensors
from retention.cache.persist import restore_cache, save_cache
from retention.cache.rotation import Rotation
from retention.cache.tokens import Tokens
from retention.cache.trigger import Trigger
from retention.cache.worth import entries_bought
from retention.gates import RetentionGates
from retention.memory import RetentionMemory
from retention.models.family import Rope
from retention.policies import Policy
from retention.policies.collect import REPEATED, WINDOW, statistics_of
from retention.types import ModelShape


class EvictingCache(Cache):
    """All layers of one batch of sequences, evicted together at the end of a forward.

    Make one with `retention.evicting(...)`, which also installs the hooks that feed it. Not croppable.
    """

    def __init__(
        self,
        shape: ModelShape,
        layers: Iterable[Any],
        policy: Policy,
        config: CacheConfig,
        *,
        extra_collectors: Iterable[str] = (),
        rotation: Rotation | None = None,
        rope: Rope | None = None,
        memory: RetentionMemory | None = None,
        base: Mapping[str, str] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`layers` holds transformers' own layer where it stays, None where this cache takes over.

        `memory` takes what leaves where `config.on_evict` is memory. `base` identifies the model and `device` says
        where it lives, for conversations that are saved and restored.
        """
        counter = iter(range(10**6))
        super().__init__(layers=[EvictingLayer(self, next(counter)) if x is None else x for x in layers])
        self.blank = {i: copy.deepcopy(x) for i, x in enumerate(self.layers) if not isinstance(x, EvictingLayer)}
        """Layers that this cache does not manage, as they begin."""
        self.shape, self.memory, self.rotation, self.rope = shape, memory, rotation, rope
        self.extra_collectors = tuple(extra_collectors)
        self.rope_deltas: Tensor | None = None
        """What models with three-axis positions keep between the turns of a conversation."""
        self.base, self.device = dict(base or {}), device or torch.device("cpu")
        self.meter = PeakMeter()
        self.tokens = Tokens()
        self.new_tokens = 0
        self.tail_padded = False
        self.own_mask = False
        """Whether prompts see more than the past, so that the model's mask has to be read."""
        self.in_prompt, self.starts, self.ends = False, True, True
        self.early: tuple[Tensor, Tensor] | None = None
        """Budgets and entries of the eviction under way, where layers are evicted one by one."""
        self.changed = False
        """Memory was allocated since the peak was noted last."""
        self.staging = 0
        self.coordinates: Int[Tensor, "axes batch tokens"] | None = None
        self.upcoming: Int[Tensor, " batch"] | None = None
        self.expected: Int[Tensor, " batch"] | None = None
        self.evicted = False
        self.automatic = True
        self.resolved: list[int] = []
        self.reader: Reader | None = None
        """Feeds more behind the prompt, where the policy needs that."""
        self.gates: RetentionGates | None = None
        """What scores its tokens; forks share it."""
        self.configure(policy, config)

    def configure(self, policy: Policy, config: CacheConfig) -> None:
        """Evict by this policy from now on; for caches that hold nothing yet, and forks.

        Raises:
            ValueError: when the policy cannot run so.
        """
        check_policy(policy, config, rotates=self.rotation is not None, remembers=self.memory is not None)
        self.policy, self.config = policy, config
        self.watching = self.memory.config.collectors if self.memory is not None and self.on_evict in REMEMBER else ()
        """What the memory in force reads beside the policy."""
        self.collectors = tuple(dict.fromkeys((*policy.collectors, *self.extra_collectors, *self.watching)))
        self.trigger = Trigger(1 if policy.steps else config.evict_every)
        self.tokens.inputs.keep(wanted=REPEATED in self.collectors)

    @property
    def curve(self) -> Curve | None:
        """The threshold of a budget, where gates know one."""
        return None if self.gates is None else self.gates.thresholds

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
        starts: bool = True,
        ends: bool = True,
        padded: bool = True,
        coordinates: Int[Tensor, "axes batch tokens"] | None = None,
        upcoming: Int[Tensor, " batch"] | None = None,
    ) -> None:
        """Told before a forward: which of its tokens are padding, which are visual, whether it is (part of) a prompt.

        `starts` is false for all chunks of a prompt but the first, `ends` for all but the last.
        `coordinates` are rotary positions of several axes, where the model has them; `upcoming` is the smallest
        of those still to come in the same prompt.
        """
        if self.policy.steps and not prompt:
            self.tokens.note_left(self.kept())
        self.tokens.add(valid, visual, prompt=prompt)
        self.coordinates, self.upcoming, self.early = coordinates, upcoming, None
        self.in_prompt, self.starts, self.ends, self.new_tokens = prompt, prompt and starts, ends, valid.shape[1]
        self.tail_padded = self.tail_padded or (padded and not bool(valid.all()))

    @property
    def columns(self) -> int:
        """Tokens fed so far, padding included."""
        return len(self.tokens)

    def protect(self, mask: Bool[Tensor, "batch tokens"]) -> None:
        """Tokens that no policy may drop, among the next ones this cache is fed; they count inside the budget.

        Call it before the forward or `generate()` whose prompt the mask describes; True = protected. Tokens after
        those of the mask are not protected.

        Raises:
            ValueError: for anything but a boolean mask [batch, tokens].
        """
        self.tokens.protect(mask)

    def mark_evidence(self, mask: Bool[Tensor, "batch positions"]) -> None:
        """Name the tokens that answer the questions, by sequence position; only the policy `oracle` reads it."""
        self.tokens.evidence = mask.to(self.device)

    def after_attention(self, layer: EvictingLayer) -> None:
        """Told after a layer's attention over a prompt: evict it at once where no other layer has a say.

        So the whole prompt is held in one layer at a time, not in all.
        """
        if not (
            self.in_prompt and self.automatic and self.policy.evicts and decides_by_layer(self.policy, self.config)
        ):
            return
        if self.early is None:
            self._note_rotation()
            self.early = self.budgets(), self.kept(upcoming=True)
        budgets, available = self.early
        number = self.evicting_layers.index(layer)
        masks = decide([layer.state()], self.policy, self.config, budgets, available, only=number, curve=self.curve)
        if masks is not None:
            self._keep(layer, masks[0], spare=0)
            self.evicted = True

    def after_forward(self) -> None:
        """Told after a forward of a prompt, a chunk of one, or a decoded token: evict if it is time to."""
        early, self.early = self.early, None
        if early is None:
            self._note_rotation()
        if self.changed or self.staging:
            self.note_peak(self.staging)
        self.staging = 0
        due = self.automatic and self.policy.evicts and self.trigger.due(self.new_tokens, prompt=self.in_prompt)
        if due and early is None:
            self.evict()
        elif early is not None and not self.evicting_layers[0].store.tail:
            self._evicted()

    def _note_rotation(self) -> None:
        if self.rotation is not None and (self.packs or not self.evicted):
            valid, coordinates = self.tokens.valid[:, self.columns - self.new_tokens :], self.coordinates
            if coordinates is None and self.rotation.rope.axes > 1:  # text alone: the model counts columns
                places = torch.arange(self.columns - self.new_tokens, self.columns, device=valid.device)
                coordinates = places.expand(self.rotation.rope.axes, len(valid), -1)
            self.rotation.note(coordinates, valid, self.upcoming)

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
        return self.in_prompt or (self.automatic and self.trigger.evict_every is not None)

    @property
    def window(self) -> int:
        """Query rows to keep: the policy's own, or as many as any fork's policy may read."""
        shared = bool(statistics_of((*self.extra_collectors, *self.watching), rolling=True))
        return self.policy.observed_rows if self.policy.observed_rows and not shared else WINDOW

    def accumulating(self) -> set[str]:
        """Names of statistics that survive an eviction."""
        rolling = self.collectors if self.trigger.evict_every is not None or not self.ends else ()
        return statistics_of(self.collectors, accumulating=True) | statistics_of(rolling, rolling=True)

    def seen(self) -> Int[Tensor, " batch"]:
        """Tokens processed per row, padding excluded."""
        return self.tokens.seen()

    @property
    def on_evict(self) -> str:
        """What becomes of entries that leave."""
        return self.config.on_evict or self.policy.on_evict

    @property
    def packs(self) -> bool:
        """Whether evictions re-rotate what stays."""
        return self.config.positions == "packed"

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry's key and value."""
        return sum(buffer.entry_bytes for buffer in self.evicting_layers[0].store.buffers)

    def budgets(self) -> Int[Tensor, " batch"]:
        """The budget of each row in entries per layer and head; a fraction is of the whole prompt under way."""
        placed = 4 * self.rotation.rope.axes if self.packs and self.rotation else 0
        scored = self.evicting_layers[0].store.gate_bytes
        seen = torch.maximum(self.seen(), self.expected) if self.expected is not None else self.seen()
        state = 0 if self.memory is None or self.on_evict not in (*REMEMBER, "refund") else self.memory.state_bytes()
        entry = self.entry_bytes + 4 + placed + scored
        self.resolved = [
            entries_bought(self.config.budget, int(n), self.shape, entry, state, self.on_evict) for n in seen
        ]
        return torch.tensor(self.resolved, device=self.tokens.valid.device)

    def evict(self) -> None:
        """Let the policy rank all entries now and free what exceeds the budget, in every layer at once."""
        if not self.policy.evicts:
            return
        layers, rule = self.evicting_layers, self.policy.step_rule
        if rule is not None and self.tokens.left is not None:
            masks = drop_one((layer.state() for layer in layers), rule, self.config)
        else:
            masks = decide(states(self), self.policy, self.config, self.budgets(), self.kept(), curve=self.curve)
        if masks is None:
            return
        spare = 0 if self.in_prompt else self.trigger.evict_every or 0
        for layer, mask in zip(layers, masks, strict=True):
            self._keep(layer, mask, spare=spare)
        self._evicted()

    def _keep(self, layer: EvictingLayer, mask: Bool[Tensor, "batch kv_heads keys"], *, spare: int) -> None:
        before = tensor_bytes(*(x for group in layer.store.tensors().values() for x in group))
        layer.keep(mask[..., : layer.store.longest + layer.store.tail], spare=spare)
        self.note_peak(staging=before + self.staging)
        self.staging = 0

    def _evicted(self) -> None:
        """What holds once all layers were evicted."""
        self.evicted, self.tail_padded = True, False
        if self.rotation is not None:
            self.rotation.packed()

    def kept(self, *, upcoming: bool = False) -> Int[Tensor, "layers batch kv_heads"]:
        """Entries held now, padding excluded; `upcoming`: with those that layers are still to get in this forward."""
        rows = []
        for layer in self.evicting_layers:
            length = layer.store.tail + (self.columns - layer.length if upcoming else 0)
            tail = self.tokens.valid[:, self.columns - length : self.columns].sum(1)
            counts = torch.zeros_like(tail)[:, None] if layer.store.counts is None else layer.store.counts
            rows.append((counts + tail[:, None]).expand(-1, self.shape.num_kv_heads))
        return torch.stack(rows)

    def kept_table(self) -> Bool[Tensor, "layers batch kv_heads positions"]:
        """Whether the entry of each sequence position is held, by layer and head."""
        tables = []
        for layer in self.evicting_layers:
            state = layer.state()
            slot = torch.where(state.valid, state.positions, self.columns)
            table = torch.zeros(*slot.shape[:2], self.columns + 1, dtype=torch.bool, device=slot.device)
            tables.append(table.scatter(-1, slot, True)[..., : self.columns])
        return torch.stack(tables)

    def tensors(self) -> Mapping[str, list[Tensor]]:
        """Every tensor the cache holds, by ledger item."""
        groups = {"layout": self.tokens.tensors(), "statistics": self.tokens.inputs.tensors(), "memory": []}
        if self.rotation is not None and self.rotation.coordinates is not None:
            groups["layout"].append(self.rotation.coordinates)
        for layer in self.evicting_layers:
            for item, found in layer.tensors().items():
                groups.setdefault(item, []).extend(found)
        stock = (stock_tensors(layer) for layer in self.layers if not isinstance(layer, EvictingLayer))
        return groups | {"outside": [x for found in stock for x in found]}

    def note_peak(self, staging: int = 0) -> None:
        """Record the bytes held now, plus transient ones."""
        self.meter.note(sum(physical_bytes(self.tensors()).values()) + staging)
        self.changed = False

    def bytes(self) -> Ledger:
        """Physical and logical bytes by item, and the peak so far."""
        self.note_peak()
        entries = int(self.kept().sum()) if self.columns else 0
        stores = [layer.store for layer in self.evicting_layers]
        return Ledger.of(physical_bytes(self.tensors()), logical_bytes(stores, entries), self.meter.peak)

    def save(self, file: Path | str) -> None:
        """Write the conversation to one safetensors file, whole or not at all; model and gates are not in it."""
        save_cache(self, Path(file))

    def restore(self, file: Path | str) -> None:
        """Continue a saved conversation in place of this one, under this cache's policy and budget.

        Raises:
            ValueError: when the file is missing, damaged, newer, of another base, or lacks what the policy reads.
        """
        restore_cache(self, Path(file))

    def fork(self, policy: Policy | None = None, config: CacheConfig | None = None) -> "EvictingCache":
        """An independent continuation of the same prefill, with another policy or budget if given; never on hold.

        With another policy the peak starts anew from what that policy alone would hold: its own statistics
        beside the keys and values, nobody else's.

        Raises:
            ValueError: when the policy reads what was not collected, or packed positions come too late.
        """
        return fork_cache(self, policy, config)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams, in all layers and in what rows share."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # any integer tensor will do
        self._select_shared(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.reorder_cache(
            torch.arange(self.tokens.valid.shape[0], device=self.tokens.valid.device).repeat_interleave(repeats)
        )

    def _select_shared(self, rows: Tensor) -> None:
        before = len(self.tokens.valid)
        self.tokens.select_rows(rows)
        self.expected = None if self.expected is None else self.expected[rows]
        if self.rope_deltas is not None and len(self.rope_deltas) == before:  # not so where beams share one
            self.rope_deltas = self.rope_deltas[rows]
        if self.rotation is not None:
            self.rotation.select_rows(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: evicted entries cannot come back."""
        self.evicting_layers[0].crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything; the policy and its configuration stay."""
        for layer in self.evicting_layers:
            layer.reset()
        for i, blank in self.blank.items():
            self.layers[i] = copy.deepcopy(blank)
        self.tokens, self.new_tokens, self.tail_padded = Tokens(), 0, False
        self.expected, self.evicted, self.meter, self.rope_deltas = None, False, PeakMeter(), None
        if self.rotation is not None:
            self.rotation.reset()
        self.configure(self.policy, self.config)
