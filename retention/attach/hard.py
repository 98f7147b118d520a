"""Inference glue: stages gate outputs, masks and statistics for an evicting cache around an unforked forward."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from retention.attach.chunks import chunk_ends, run_chunks
from retention.attach.decode import decode_attention, recalled_attention
from retention.attach.deltas import own_rope_deltas
from retention.attach.facts import TokenFacts
from retention.attach.hooks import Attend, attached, running
from retention.attach.plain import AttentionCall, output_weight
from retention.attach.second_pass import second_passes
from retention.cache.config import CacheConfig
from retention.cache.evicting import EvictingCache
from retention.cache.layer import EvictingLayer
from retention.cache.rotation import Rotation
from retention.gates import RetentionGates
from retention.memory import RetentionMemory
from retention.models import family_of
from retention.models.family import decoder_device, decoder_of, fingerprint, model_shape, rope_of
from retention.ops.rope import angles
from retention.policies import Policy
from retention.policies.collect import COLLECTORS, Observation, Rotary, rows_read

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evicting_attention(layer: EvictingLayer, call: AttentionCall) -> Float[Tensor, "batch queries heads value_dim"]:
    """Attention over what a layer holds: SDPA for prompts, the storage's own way for single tokens."""
    query, queries, scaling = call.query, call.query.shape[2], call.scaling
    layer.scaling = scaling
    with layer.seeing(call.mask if layer.owner.own_mask else None):
        observed = layer.owner.observing() and any(COLLECTORS[name] for name in layer.owner.collectors)
        if queries > 1 or observed:
            key, value = layer.read()
            call = replace(call, key=key, value=value)
        if observed:
            layer.observe(_observation(layer, call))
        if queries == 1:
            return decode_attention(layer, query, scaling).transpose(1, 2)
        if layer.recalled:
            return recalled_attention(layer, query, scaling).transpose(1, 2)
        if layer.store.counts is not None:
            call = replace(call, mask=layer.attention_mask(queries, query.shape[1] // call.key.shape[1]))
    out = call.plain()
    layer.owner.after_attention(layer)
    return out


def _observation(layer: EvictingLayer, call: AttentionCall) -> Observation:
    """What collectors may look at in this call."""
    cache, queries = layer.owner, call.query.shape[2]
    rows = rows_read(cache.collectors, queries, cache.window)
    return Observation(
        call.query[:, :, -rows:],
        call.key,
        layer.visible(rows),
        call.scaling,
        cache.window,
        values=call.value,
        output=output_weight(call.module),
        rotary=_rotary(cache, queries),
    )


def _rotary(cache: EvictingCache, queries: int) -> Rotary | None:
    """How the newest tokens were rotated, where a collector asks for it."""
    if cache.rope is None or "query_moments" not in cache.collectors:
        return None
    positions, frequencies = cache.tokens.positions()[:, -queries:], cache.rope.frequencies()
    places = positions[None] if cache.coordinates is None else cache.coordinates
    upcoming = places.amax((0, 2)) + 1
    return Rotary(angles(places, frequencies, cache.rope.axis), frequencies, positions, upcoming)


def new_cache(
    model: "PreTrainedModel",
    policy: Policy,
    config: CacheConfig,
    *,
    extra_collectors: Iterable[str] = (),
    packed: bool = False,
    memory: RetentionMemory | None = None,
) -> EvictingCache:
    """An empty evicting cache for a model; layers that cannot be evicted keep transformers' own."""
    from transformers import DynamicCache

    shape = model_shape(model)
    if not shape.layers:
        raise ValueError(
            "expected a model with full-attention layers, got one whose layers are all sliding or linear; their memory "
            "does not grow with the context, so use the model's own cache"
        )
    stock = DynamicCache(config=model.config.get_text_config()).layers
    layers: list[Any] = [None if i in shape.layers else layer for i, layer in enumerate(stock)]
    needs_rope = packed or config.positions == "packed"
    rotation = Rotation(rope_of(model, family_of(model))) if needs_rope else None
    reads_queries = "query_moments" in (*policy.collectors, *extra_collectors)
    return EvictingCache(
        shape,
        layers,
        policy,
        config,
        extra_collectors=extra_collectors,
        rotation=rotation,
        rope=rope_of(model, family_of(model)) if reads_queries else None,
        memory=memory,
        base=fingerprint(model) | {"dtype": str(model.dtype)},
        device=decoder_device(model),
    )


@contextmanager
def evicting(
    model: "PreTrainedModel",
    policy: Policy,
    config: CacheConfig | None = None,
    *,
    gates: RetentionGates | None = None,
    extra_collectors: Iterable[str] = (),
    packed: bool = False,
    memory: RetentionMemory | None = None,
    tokenizer: Any = None,
) -> Iterator[EvictingCache]:
    """Inside the block, forwards and `generate()` with the yielded cache (or its forks) evict as configured.

    `extra_collectors` and `packed=True` prepare a cache whose forks may use other policies or packed
    positions. `memory` takes what is evicted where `CacheConfig.on_evict` is memory; by default the gates' own. With a
    `tokenizer` (or processor) a policy that feeds the context once more asks for it in words. On exit the model is
    exactly as before; the cache stays readable.

    Raises:
        ValueError: when the policy needs gates and none are given, the gates do not fit, or the model is attached already.
    """
    config = config or CacheConfig()
    if policy.needs_gates and gates is None:
        raise ValueError(
            f"{type(policy).__name__} ranks by trained gates and none were given; pass gates=RetentionGates..."
        )
    extra = tuple(extra_collectors)
    if "gate" in extra and gates is None:
        raise ValueError("collecting 'gate' needs trained gates and none were given; pass gates=RetentionGates...")
    if gates is not None:
        gates.check(model)
        if policy.gates_of is not None and gates.training_record:  # fresh gates have learned nothing yet
            gates.check_objective(policy.gates_of, type(policy).__name__)
    memory = memory or (None if gates is None else gates.memory)
    if memory is not None:
        extra = (*extra, *memory.config.collectors)
    cache = new_cache(model, policy, config, extra_collectors=extra, packed=packed, memory=memory)
    cache.own_mask, cache.gates = family_of(model).own_mask, gates
    with ExitStack() as stack:
        before = partial(_before_layer, cache.shape.layers)
        facts = stack.enter_context(attached(model, cache.shape.layers, before))
        stack.enter_context(own_rope_deltas(model))
        stack.enter_context(_decoder_forward(model, facts))
        stack.enter_context(second_passes(model, cache, tokenizer))
        yield cache


@torch.no_grad()
def _before_layer(layers: tuple[int, ...], number: int, kwargs: dict[str, Any]) -> Attend | None:
    """Stage the gate's output and let the layer attend over what it holds."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, EvictingCache):
        return None
    layer, gates = cache.layers[number], cache.gates
    assert isinstance(layer, EvictingLayer)
    if gates is not None and "gate" in cache.collectors:
        tokens, count = cache.tokens, kwargs["hidden_states"].shape[1]
        beside = tokens.visual[:, -count:], tokens.valid[:, -count:], layer.heard
        reading = gates.read(layers.index(number), kwargs["hidden_states"], *beside)
        layer.heard = reading.heard
        layer.stage(reading.stored(), delayed=gates.config.delayed)
    return partial(evicting_attention, layer)


@contextmanager
def _decoder_forward(model: "PreTrainedModel", facts: TokenFacts) -> Iterator[None]:
    """Tell the cache before and after each forward of the decoder, running long prompts chunk by chunk."""
    decoder = decoder_of(model)
    original = decoder.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, EvictingCache):
            return original(*args, **kwargs)
        found = facts.of(kwargs)
        batch, tokens = found.valid.shape
        if kwargs.get("position_ids") is not None:  # Qwen-VL hands over those of the whole mask when it decodes
            kwargs["position_ids"] = kwargs["position_ids"][..., -tokens:]
        cache.tokens.check_rows(batch)
        if cache.memory is not None and cache.memory.config.placed:
            cache.tokens.announce(found.places())
        cache.expected = cache.seen() + found.valid.sum(1) if cache.columns else found.valid.sum(1)
        ends = chunk_ends(cache.config, found.visual, tokens, whole_images=cache.own_mask)
        return run_chunks(original, args, kwargs, cache, ends, found)

    with running(decoder, forward):
        yield
