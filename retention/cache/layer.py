"""One layer of an evicting cache, behind transformers' cache-layer interface."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import CacheLayerMixin

from retention.cache.storage import LayerStorage, PaddedView
from retention.ops.rope import rotate_keys
from retention.policies.collect import COLLECTORS, Observation
from retention.types import KVState

if TYPE_CHECKING:
    from retention.cache.evicting import EvictingCache


def tensor_bytes(*tensors: Tensor) -> int:
    """Bytes of the elements of some tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


class EvictingLayer(CacheLayerMixin):
    """One layer's storage behind transformers' cache-layer interface; lengths are tokens seen, not tokens kept."""

    is_sliding = False

    def __init__(self, owner: "EvictingCache", number: int) -> None:
        super().__init__()
        self.owner, self.number = owner, number
        self.store = LayerStorage()
        self.length = 0
        self.staged: Tensor | None = None
        self.observed: dict[str, Tensor] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: storage takes the first tensors as they are."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values; returns everything attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        staged, self.staged = self.staged, None
        self.length += key_states.shape[2]
        self.store.append(key_states, value_states, staged)
        view = self.store.view()
        if view.kept:
            self.owner.staging = max(self.owner.staging, tensor_bytes(view.keys, view.values))
        return view.keys, view.values

    def visible(self, queries: int) -> Bool[Tensor, "batch kv_heads queries keys"]:
        """Which keys the last `queries` tokens may see: kept entries, and the tail up to themselves."""
        store, tail = self.store, self.store.tail
        valid = self.owner.valid[:, self.owner.columns - tail : self.owner.columns]
        rows = torch.arange(tail - queries, tail, device=valid.device)[:, None]
        steps = torch.arange(tail, device=valid.device)
        causal = ((steps <= rows) & valid[:, None]) | (steps == rows)
        heads = store.tail_keys.shape[1] if store.tail_keys is not None else 1
        causal = causal[:, None].expand(-1, heads, -1, -1)
        if not store.longest:
            return causal
        kept = store.kept_valid()[:, :, None].expand(-1, -1, queries, -1)
        return torch.cat([kept, causal], -1)

    def attention_mask(self, queries: int, groups: int) -> Bool[Tensor, "batch heads queries keys"] | None:
        """The mask for entries after an eviction; None where nothing is hidden."""
        if queries == 1 and self.store.uniform and not self.owner.tail_padded:
            return None
        return self.visible(queries).repeat_interleave(groups, 1)

    def observe(self, call: Observation) -> None:
        """Let the active collectors look at this attention call; queries that are padding observe nothing."""
        if self.owner.tail_padded:
            real = self.owner.valid[:, None, -call.queries.shape[2] :, None]
            call = replace(call, visible=call.visible & real)
        for name in self.owner.collectors:
            collector = COLLECTORS[name]
            if collector is None:
                continue
            for key, new in collector.observe(call).items():
                old = self.observed.get(key)
                if collector.accumulates and old is not None:
                    new = new + F.pad(old, (0, new.shape[-1] - old.shape[-1]))
                self.observed[key] = new

    def forget_unused(self, *, keep_gate: bool) -> None:
        """Free what the policy in force does not read: other policies' statistics, gate outputs."""
        names = {"window_rows", "column_sums"} & set(self.owner.collectors)
        self.observed = {k: v for k, v in self.observed.items() if k in names}
        if "window_rows" in self.observed:
            self.observed["window_rows"] = self.observed["window_rows"][:, :, -self.owner.window :].clone()
        if not keep_gate:
            self.store.log_beta = self.store.tail_log_beta = None

    def state(self) -> tuple[KVState, PaddedView]:
        """Everything a policy may look at."""
        store, cache = self.store, self.owner
        view = store.view()
        shape = (*view.keys.shape[:2], store.tail)
        tail_columns = slice(cache.columns - store.tail, cache.columns)
        positions = cache.positions()[:, None, tail_columns].expand(shape)
        valid = cache.valid[:, None, tail_columns].expand(shape)
        log_beta = store.tail_log_beta
        if view.kept:
            assert store.positions is not None
            positions = torch.cat([store.padded(store.positions).long(), positions], -1)
            valid = torch.cat([store.kept_valid(), valid], -1)
            if store.log_beta is not None and log_beta is not None:
                log_beta = torch.cat([store.padded(store.log_beta), log_beta], -1)
        visual = cache.visual_by_position().gather(1, positions.clamp(min=0).flatten(1)).view(positions.shape)
        statistics = {k: F.pad(v, (0, view.keys.shape[2] - v.shape[-1])) for k, v in self.observed.items()}
        entries = (view.keys, view.values)
        protected = torch.zeros_like(valid)
        return KVState(
            lambda: entries,
            positions,
            valid,
            visual & valid,
            protected,
            cache.seen(),
            log_beta,
            statistics,
            self.number,
        ), view

    def keep(self, mask: Bool[Tensor, "batch kv_heads keys"], state: KVState, view: PaddedView) -> None:
        """Drop what the mask does not name; re-rotate what stays where positions are packed."""
        if self.owner.inv_freq is not None:
            view = PaddedView(self._packed(mask, state, view), view.values, view.kept)
        accumulated = {k: v for k, v in state.statistics.items() if k in self.owner.accumulating()}
        flat = {k: v[mask] for k, v in accumulated.items()}
        self.store.keep(mask, view, state.positions, state.log_beta)
        self.observed = {k: self.store.padded(v) for k, v in flat.items()} if self.store.longest else {}

    def _packed(self, mask: Tensor, state: KVState, view: PaddedView) -> Float[Tensor, "batch kv_heads keys head_dim"]:
        """Keys turned so that the kept ones end right before the next token, without gaps."""
        assert self.owner.inv_freq is not None
        written = state.positions.clone()
        if view.kept and self.owner.anchor is not None and self.store.counts is not None:
            rank = torch.arange(view.kept, device=mask.device)
            first = self.owner.anchor[:, None] - self.store.counts
            written[:, :, : view.kept] = first[..., None] + rank
        wanted = state.seen[:, None, None] - mask.sum(-1, keepdim=True) + mask.long().cumsum(-1) - 1
        return rotate_keys(view.keys, torch.where(mask, wanted - written, 0), self.owner.inv_freq)

    def get_seq_length(self) -> int:
        """Tokens processed, padding included: what drives positions."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the stock mask: the columns of the tail and the new tokens."""
        return self.store.tail + query_length, self.length - self.store.tail

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: evicted entries cannot come back."""
        raise NotImplementedError(
            "an evicting cache cannot be cropped, because evicted entries cannot be rolled back; switch off assisted "
            "and prompt-lookup decoding, or use the full cache"
        )

    def reset(self) -> None:
        """Forget everything."""
        self.store, self.length, self.staged, self.observed = LayerStorage(), 0, None, {}
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams; the owner reorders what rows share."""
        rows = beam_idx.to(self.owner.valid.device)
        self.store.select_rows(rows)
        self.observed = {k: v[rows] for k, v in self.observed.items()}
