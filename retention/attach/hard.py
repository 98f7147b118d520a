"""Inference glue: stages gate outputs, masks and statistics for an evicting cache around an unforked forward."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from retention.attach.chunks import chunk_ends, run_chunks
from retention.attach.decode import decode_attention
from retention.attach.deltas import own_rope_deltas
from retention.attach.facts import TokenFacts, attached, register_attention, valid_tokens
from retention.cache.config import CacheConfig
from retention.cache.evicting import EvictingCache
from retention.cache.layer import EvictingLayer
from retention.cache.rotation import Rotation
from retention.gates import RetentionGates
from retention.models import family_of
from retention.models.family import decoder_of, fingerprint, model_shape, rope_of
from retention.policies import Policy
from retention.policies.collect import COLLECTORS, Observation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "retention_hard"


def evicting_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    retention_layer: EvictingLayer | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' interface: SDPA for prompts, the storage's own way for single tokens."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer, queries = retention_layer, query.shape[2]
    if layer is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    observed = layer.owner.observing() and any(COLLECTORS[name] for name in layer.owner.collectors)
    if queries > 1 or observed:
        key, value = layer.read()
    if observed:
        layer.observe(Observation(query, key, layer.visible(queries), scale, layer.owner.window))
    if queries == 1:
        return decode_attention(layer, query, scale).transpose(1, 2), None
    if layer.store.counts is not None:
        attention_mask = layer.attention_mask(queries, query.shape[1] // key.shape[1])
    out = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    layer.owner.after_attention(layer)
    return out


def new_cache(
    model: "PreTrainedModel",
    policy: Policy,
    config: CacheConfig,
    *,
    extra_collectors: Iterable[str] = (),
    packed: bool = False,
) -> EvictingCache:
    """An empty evicting cache for a model; layers that cannot be evicted keep transformers' own."""
    from transformers import DynamicCache

    shape = model_shape(model)
    stock = DynamicCache(config=model.config.get_text_config()).layers
    layers: list[Any] = [None if i in shape.layers else layer for i, layer in enumerate(stock)]
    needs_rope = packed or config.positions == "packed"
    rotation = Rotation(rope_of(model, family_of(model))) if needs_rope else None
    return EvictingCache(
        shape,
        layers,
        policy,
        config,
        extra_collectors=extra_collectors,
        rotation=rotation,
        base=fingerprint(model) | {"dtype": str(model.dtype)},
        device=model.device,
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
) -> Iterator[EvictingCache]:
    """Inside the block, forwards and `generate()` with the yielded cache (or its forks) evict as configured.

    `extra_collectors` and `packed=True` prepare a cache whose forks may use other policies or packed
    positions. On exit the model is exactly as before; the cache stays readable.

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
    cache = new_cache(model, policy, config, extra_collectors=extra, packed=packed)
    register_attention(NAME, evicting_attention)
    with ExitStack() as stack:
        stack.enter_context(attached(model, NAME))
        for hook in _install(model, cache.shape.layers, gates):
            stack.callback(hook.remove)
        stack.enter_context(own_rope_deltas(model))
        stack.enter_context(_decoder_forward(model))
        yield cache


def _install(model: "PreTrainedModel", layers: tuple[int, ...], gates: RetentionGates | None) -> list[Any]:
    """Hooks on attention that stage the gate's output and hand the layer to the attention function."""

    @torch.no_grad()
    def before_attention(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, EvictingCache):
            return None
        layer: Any = cache.layers[module.layer_idx]
        if gates is not None and "gate" in cache.collectors:
            layer.staged = gates(layers.index(module.layer_idx), kwargs["hidden_states"])
        return args, {**kwargs, "retention_layer": layer}

    decoder = decoder_of(model)
    modules = [decoder.layers[i].self_attn for i in layers]
    return [m.register_forward_pre_hook(before_attention, with_kwargs=True) for m in modules]


@contextmanager
def _decoder_forward(model: "PreTrainedModel") -> Iterator[None]:
    """Tell the cache before and after each forward of the decoder, running long prompts chunk by chunk."""
    decoder, facts = decoder_of(model), TokenFacts(family_of(model), model.config)
    hook = model.register_forward_pre_hook(facts.catch, with_kwargs=True)
    original = decoder.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, EvictingCache):
            return original(*args, **kwargs)
        inputs = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        batch, tokens = inputs.shape[:2]
        mask = kwargs.get("attention_mask")
        valid = valid_tokens(mask, batch, tokens, inputs.device)
        visual = facts.take(batch, tokens, inputs.device)
        cache.expected = cache.seen() + valid.sum(1) if cache.columns else valid.sum(1)
        ends = chunk_ends(cache.config, visual, tokens)
        return run_chunks(original, args, kwargs, cache, ends, valid, visual)

    own = vars(decoder).get("forward")
    decoder.forward = forward
    try:
        yield
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own
        hook.remove()
