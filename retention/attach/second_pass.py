"""Feeds more behind a prompt before anything of it leaves, and notes how much of the prompt that heeds.

Each feed is a forward of its own behind the cached entries, at the positions that come next; nothing of it stays and
the cache does not advance. No map of attention is kept: per entry the largest value (or the sum) so far.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from retention.attach.hooks import Attend, layer_hooks
from retention.attach.plain import AttentionCall, output_weight
from retention.attach.repetition import Feed, foreseen, repeated
from retention.cache.evicting import EvictingCache
from retention.cache.layer import EvictingLayer, tensor_bytes
from retention.models.family import decoder_of
from retention.models.versions import GrowingLayer
from retention.ops.blocks import BLOCK
from retention.ops.heeded import heeded
from retention.ops.output_norms import l2_output_norms
from retention.policies.collect import Foresight, Repetition

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ListeningLayer(GrowingLayer):
    """A layer that lends its entries to feeds and notes what these heed; it never grows."""

    def __init__(self, source: EvictingLayer, plan: Repetition | Foresight) -> None:
        super().__init__()
        self.source, self.plan = source, plan
        self.state = source.state()
        self.found = torch.zeros(self.state.valid.shape, device=self.state.valid.device)
        self.feed: Feed
        self.hidden: Tensor
        """Attention input of the feed."""
        self.staging = 0

    def attend(self, call: AttentionCall) -> Float[Tensor, "batch fed heads value_dim"]:
        """Attention over all entries and the feed so far, in blocks of queries."""
        self._listen(call)
        query, held = call.query, self.source.read()
        keys, values = (torch.cat([old, new], 2) for old, new in zip(held, (call.key, call.value), strict=True))
        self.staging = max(self.staging, tensor_bytes(keys, values))
        together = self.source.store.counts is None  # before the first eviction all heads see the same
        valid = (
            self.state.valid[:, :1]
            if together
            else self.state.valid.repeat_interleave(query.shape[1] // keys.shape[1], 1)
        )
        outputs = []
        for own in torch.arange(query.shape[2], device=query.device).split(BLOCK):
            part = replace(call, query=query[:, :, own], key=keys, value=values, mask=self._visible(valid, own))
            outputs.append(part.plain())
        return torch.cat(outputs, 1)

    def _visible(
        self, held: Bool[Tensor, "batch kv_heads keys"], own: Int[Tensor, " queries"]
    ) -> Bool[Tensor, "batch kv_heads queries all_keys"]:
        """Some held entries, and of the feed what comes before each query and the query itself."""
        steps = torch.arange(self.feed.valid.shape[1], device=own.device)
        causal = ((steps <= own[:, None]) & self.feed.valid[:, None]) | (steps == own[:, None])
        fed = causal[:, None].expand(-1, held.shape[1], -1, -1)
        return torch.cat([held[:, :, None].expand(-1, -1, len(own), -1), fed], -1)

    def _listen(self, call: AttentionCall) -> None:
        """Note what the feed heeds of the entries it is measured against."""
        among = self.state.valid & self.feed.measured(self.state.positions)
        slots = among.long().argsort(dim=-1, descending=True, stable=True)[..., : int(among.sum(-1).max())]
        query, keys = call.query, torch.cat([_rows(self.state.keys, slots), call.key], 2)
        sizes = streams = None
        if self.feed.weighed:
            weight = output_weight(call.module)
            if weight is None:
                raise ValueError("a second pass weighed by values needs an attention module with a plain o_proj weight")
            values = torch.cat([_rows(self.state.values, slots), call.value], 2)
            sizes, streams = l2_output_norms(values, weight, query.shape[1]), self.hidden.float().norm(dim=-1)
        visible = self._visible(among.gather(-1, slots), torch.arange(query.shape[2], device=query.device))
        new = heeded(
            query,
            keys,
            visible,
            self.feed.asking,
            call.scaling,
            sizes=sizes,
            streams=streams,
            summed=self.feed.summed,
        )[..., : slots.shape[-1]]
        old = self.found.gather(-1, slots)
        self.found = self.found.scatter(-1, slots, old + new if self.feed.summed else torch.maximum(old, new))

    def settle(self, fresh: Bool[Tensor, "batch kv_heads keys"], share: Float[Tensor, " batch"]) -> None:
        """Hand over what fresh entries got; the others keep what they had."""
        name, found = self.plan.statistic, self.found * share[:, None, None]
        old = self.source.observed.get(name)
        if old is not None:
            found = torch.where(fresh, found, F.pad(old, (0, found.shape[-1] - old.shape[-1])))
        self.source.observed[name] = found

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Nothing is kept."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens before the feed, padding included."""
        return self.source.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of the stock mask, which attention does not read."""
        return query_length, self.source.get_seq_length()


def _rows(entries: Tensor, slots: Int[Tensor, "batch kv_heads some"]) -> Float[Tensor, "batch kv_heads some width"]:
    return entries.gather(2, slots[..., None].expand(*slots.shape, entries.shape[-1]))


@dataclass
class SecondPass:
    """Runs what policies ask for on one model, as long as the block is open that made it."""

    model: "PreTrainedModel | None"
    tokenizer: Any = None
    """Of the model; without one nothing asks for the repetition."""

    @torch.no_grad()
    def __call__(self, cache: EvictingCache, plan: Repetition | Foresight) -> None:
        """Fill in the statistic of a plan in all layers of a cache.

        Raises:
            ValueError: once the block is left.
        """
        if self.model is None:
            raise ValueError(
                f"{type(cache.policy).__name__} feeds the model once more before it evicts: evict inside the "
                "`with retention.evicting(model, ...)` block"
            )
        decoder, inputs = decoder_of(self.model), cache.tokens.inputs
        feeds = (
            foreseen(decoder, cache, plan) if isinstance(plan, Foresight) else repeated(decoder, cache, plan, self._ids)
        )
        listening = [ListeningLayer(layer, plan) for layer in cache.evicting_layers]
        asked = torch.zeros(len(cache.tokens.valid), device=cache.tokens.valid.device)
        at = dict(zip(cache.shape.layers, listening, strict=True))

        def before_layer(number: int, kwargs: dict[str, Any]) -> Attend:
            at[number].hidden = kwargs["hidden_states"]
            return at[number].attend

        with layer_hooks(decoder, cache.shape.layers, before_layer), _as_it_was(decoder):
            for feed in feeds:
                asked = asked + feed.asking.sum(1)
                _run(decoder, cache, listening, feed)
        groups = cache.shape.num_heads // cache.shape.num_kv_heads
        mean = isinstance(plan, Foresight) and plan.mean
        share = 1 / (groups * asked).clamp(min=1) if mean else torch.ones_like(asked)
        first = cache.tokens.valid[:, : inputs.first].sum(1) if inputs.parts else cache.seen()
        for layer in listening:
            scored = layer.source.observed.get(plan.statistic)
            held = torch.arange(layer.state.valid.shape[-1], device=first.device)
            late = held >= (0 if scored is None else scored.shape[-1])
            fresh = late if isinstance(plan, Foresight) else late | (layer.state.positions >= first[:, None, None])
            layer.settle(fresh.expand(layer.state.valid.shape), share)
        if not isinstance(plan, Foresight):
            inputs.read(cache.columns)
        cache.note_peak(max(layer.staging for layer in listening))

    def _ids(self, words: str) -> list[int]:
        """Token ids of some words; none without a tokenizer, or where it does not know all of them."""
        if self.tokenizer is None or not words:
            return []
        tokenizer = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        ids: list[int] = tokenizer(words, add_special_tokens=False)["input_ids"]
        return [] if tokenizer.unk_token_id in ids else ids


def _run(decoder: Any, cache: EvictingCache, listening: list[ListeningLayer], feed: Feed) -> None:
    """One forward behind the cache, which stays as it is."""
    ours = iter(listening)
    layers = [next(ours) if isinstance(layer, EvictingLayer) else copy.deepcopy(layer) for layer in cache.layers]
    for layer in listening:
        layer.feed = feed
    decoder.forward(
        inputs_embeds=feed.embeddings,
        attention_mask=torch.cat([cache.tokens.valid, feed.valid], 1).long(),
        position_ids=feed.places if len(feed.places) > 1 else feed.places[0],
        past_key_values=Cache(layers=layers),
        use_cache=True,
        **feed.beside,
    )


@contextmanager
def _as_it_was(decoder: Any) -> Iterator[None]:
    """Frequencies that grow with the positions are afterwards what they were."""
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        yield
        return
    plain, buffers = dict(vars(rotary)), {name: x.clone() for name, x in rotary._buffers.items() if x is not None}
    names = dict(rotary._buffers)
    try:
        yield
    finally:
        vars(rotary).update(plain)
        rotary._buffers.update(names)
        for name, x in buffers.items():
            rotary._buffers[name].copy_(x)


@contextmanager
def second_passes(model: "PreTrainedModel", cache: EvictingCache, tokenizer: Any) -> Iterator[None]:
    """Inside, the cache and its forks may feed the model once more before they evict."""
    cache.reader = reader = SecondPass(model, tokenizer)
    try:
        yield
    finally:
        reader.model = None
