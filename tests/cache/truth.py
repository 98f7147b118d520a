"""Truths for any architecture: a full cache with dropped entries hidden, and keys rotated by the model itself."""

import copy
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retention.cache.evicting import EvictingCache
from retention.models.family import decoder_of, evictable_layers
from retention.ops.rope import naive_packed_coordinates
from tests.cache.helpers import small


def one_of_each(names: Iterable[str]) -> list[str]:
    """The first policy of every kind that the cache treats differently: what is read, who allocates, when."""
    kinds: dict[Any, str] = {}
    for name in sorted(names):
        policy = small(name)
        kind = (policy.collector, policy.allocator, policy.selector, policy.evicts, policy.evicts_while_decoding)
        kinds.setdefault(kind, name)
    return list(kinds.values())


class Hiding:
    """A stock model and cache that never drop anything: full-attention layers may not see what is not in a table.

    Rotation is the model's own, so it is the truth for original positions. `feed` takes whatever the model takes.
    Make one outside `evicting`, which hangs itself onto the model that is copied here.
    """

    current: "Hiding"

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface, DynamicCache
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

        AttentionInterface.register("test_hiding", hiding_attention)
        AttentionMaskInterface.register("test_hiding", sdpa_mask)
        assert "forward" not in vars(decoder_of(model)), "the model is attached"
        self.layers = evictable_layers(model)
        self.model = copy.deepcopy(model)
        composite = model.config.get_text_config() is not model.config
        self.model.set_attn_implementation({"text_config": "test_hiding"} if composite else "test_hiding")
        self.cache = DynamicCache(config=model.config.get_text_config())
        self.mask = torch.zeros(0, 0, dtype=torch.bool)
        self.held: Tensor | None = None
        Hiding.current = self

    @torch.no_grad()
    def feed(self, **inputs: Any) -> Tensor:
        """Logits of all new tokens."""
        Hiding.current = self
        ids = inputs["input_ids"]
        before = self.mask if len(self.mask) else torch.zeros(len(ids), 0, dtype=torch.bool)
        told = inputs.get("attention_mask")
        new = torch.ones_like(ids, dtype=torch.bool) if told is None else told[:, before.shape[1] :].bool()
        self.mask = torch.cat([before, new], 1)
        return self.model(**inputs, past_key_values=self.cache, use_cache=True).logits

    def drop(self, cache: EvictingCache) -> None:
        """Hide what the cache does not hold; its table is by sequence position, columns here count padding."""
        table = cache.kept_table()
        held = torch.zeros(*table.shape[:3], self.mask.shape[1], dtype=torch.bool)
        for row, mask in enumerate(self.mask):
            real = torch.nonzero(mask).flatten()
            held[:, row, :, real] = table[:, row, :, : len(real)]
        assert self.held is None or not (held[..., : self.held.shape[-1]] & ~self.held).any(), "an entry came back"
        self.held = held


def hiding_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Softmax attention written out: for the layers in question without what was dropped, as it is for the others."""
    hiding, layer, cap = Hiding.current, module.layer_idx, kwargs.get("softcap")
    length, new, groups = key.shape[2], query.shape[2], query.shape[1] // key.shape[1]
    seen = hiding.mask[:, None].expand(-1, key.shape[1], -1)
    if layer not in hiding.layers:
        seen = torch.ones_like(seen[..., -length:])
    elif hiding.held is not None:
        held = hiding.held[hiding.layers.index(layer)]
        seen = seen & F.pad(held, (0, length - held.shape[-1]), value=True)
    column, own = torch.arange(length), torch.arange(length - new, length)[:, None]
    past = column <= own if attention_mask is None else attention_mask
    visible = (past & seen[:, :, None]) | (column == own)
    key, value, visible = (x.repeat_interleave(groups, 1) for x in (key, value, visible))
    logits = scaling * query @ key.transpose(-1, -2)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def turned(rotary: Any, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys [batch, heads, tokens, head_dim] as the rotary module's own model turns them."""
    module = sys.modules[type(rotary).__module__]
    older = getattr(module, "apply_multimodal_rotary_pos_emb", None)  # the sections are picked there, not in the module
    if older is not None and cos.dim() == 4:
        return older(keys, keys, cos, sin, rotary.config.rope_parameters["mrope_section"])[1]
    return module.apply_rotary_pos_emb(keys, keys, cos, sin)[1]


class Written:
    """Keys as layers write them before rotation, and the coordinates they are rotated to; one unpadded batch."""

    def __init__(self, model: Any) -> None:
        self.model, self.layers = model, evictable_layers(model)
        self.keys: list[list[Tensor]] = [[] for _ in self.layers]
        self.places: list[Tensor] = []

    def tensors(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys [batch, kv_heads, tokens, head_dim] of a layer and coordinates [axes, batch, tokens]."""
        keys = torch.cat(self.keys[number], 2)
        return keys, torch.cat([x.expand(-1, len(keys), -1) for x in self.places], -1)

    def rotated(self, keys: Tensor, coordinates: Tensor, reached: int) -> Tensor:
        """`keys` [tokens, head_dim] as the model writes them at `coordinates` [axes, tokens] in a longer sequence."""
        rotary = decoder_of(self.model).rotary_emb
        arguments = {"layer_type": "full_attention"} if hasattr(rotary, "full_attention_inv_freq") else {}
        places = torch.cat([coordinates, torch.full_like(coordinates[:, :1], reached)], 1)[:, None]
        cos, sin = rotary.forward(keys, places if len(places) == 3 else places[0], **arguments)  # past the hook
        return turned(rotary, keys[None, None], *((x[..., :-1, :]) for x in (cos, sin)))[0, 0]

    def check_packed(self, cache: EvictingCache) -> float:
        """Largest error of a key right after an eviction, against its rotation at the packed place."""
        table, worst = cache.kept_table(), 0.0
        for number, layer in enumerate(cache.evicting_layers):
            raw, places = self.tensors(number)
            state, heads = layer.state(), raw.shape[1]
            end = places.amax((0, 2)) + 1
            wanted = naive_packed_coordinates(
                places[:, :, None].expand(-1, -1, heads, -1), table[number][..., : places.shape[-1]], end
            )
            for row in range(raw.shape[0]):
                for head in range(heads):
                    held = torch.nonzero(table[number, row, head]).flatten()
                    got = state.keys[row, head][state.valid[row, head]]
                    assert len(got) == len(held)
                    expected = self.rotated(raw[row, head, held], wanted[:, row, head, held], int(end[row]) - 1)
                    worst = max(worst, float((got - expected).abs().max()) if len(held) else 0.0)
        return worst


@contextmanager
def written(model: Any) -> Iterator[Written]:
    """Catch keys (behind their norm, where there is one) and positions of every forward inside."""
    found, handles = Written(model), []
    decoder, heads_first = decoder_of(model), model.config.model_type == "gemma3_text"

    def catch(number: int, output: Tensor) -> None:
        split = output if output.dim() == 4 else output.unflatten(-1, (-1, decoder.layers[0].self_attn.head_dim))
        found.keys[number].append(split if heads_first else split.transpose(1, 2))

    for number, index in enumerate(found.layers):
        attention = decoder.layers[index].self_attn
        source = attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj
        handles.append(source.register_forward_hook(lambda _, __, out, number=number: catch(number, out)))

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        places = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        kind = kwargs.get("layer_type", args[2] if len(args) > 2 else "full_attention")
        if kind == "full_attention":
            found.places.append(places[None] if places.dim() == 2 else places[-3:])

    handles.append(decoder.rotary_emb.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
