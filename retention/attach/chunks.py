"""Run a long prompt through the decoder chunk by chunk, evicting in between."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from retention.attach.facts import Facts
from retention.cache.config import CacheConfig
from retention.cache.evicting import EvictingCache

_SLICED = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1, "visual_pos_masks": 1}


def chunk_ends(
    config: CacheConfig, visual: Bool[Tensor, "batch tokens"], tokens: int, *, whole_images: bool = False
) -> list[int]:
    """Where chunks end: every `prefill_chunk` tokens, after every image, or once at the end.

    With `whole_images` a chunk that would end inside an image of some row ends behind it.
    """
    inside = (visual[:, :-1] & visual[:, 1:]).any(0)
    if config.chunk_by_image:
        after = (visual[:, :-1] & ~visual[:, 1:]).any(0)
        ends = (torch.nonzero(after & ~inside if whole_images else after).flatten() + 1).tolist()
        return [*ends, tokens]
    ends, step = [], config.prefill_chunk or tokens
    end = step
    while end < tokens:
        while whole_images and end < tokens and bool(inside[end - 1]):
            end += 1
        ends.append(end)
        end += step
    return [*(end for end in ends if end < tokens), tokens]


def run_chunks(
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cache: EvictingCache,
    ends: list[int],
    facts: Facts,
) -> Any:
    """Call the decoder once per chunk; the result reads as one call's.

    Raises:
        ValueError: when an argument cannot be cut into chunks.
    """
    valid, visual, padded = facts.valid, facts.visual, kwargs.get("attention_mask") is not None
    tokens = valid.shape[1]
    hidden, start, output = [], 0, None
    for end in ends:
        part = kwargs if len(ends) == 1 else _cut(kwargs, cache, start, end, visual)
        axes = coordinates(part.get("position_ids"))
        rest = None if axes is None or end == tokens else kwargs["position_ids"][-3:, :, end:].amin((0, 2))
        cache.begin(
            valid[:, start:end],
            visual[:, start:end],
            prompt=tokens > 1,
            starts=start == 0,
            ends=end == tokens,
            padded=padded,
            coordinates=axes,
            upcoming=rest,
        )
        cache.tokens.inputs.note(part, cache.columns - (end - start))
        output = forward(*args, **part)
        hidden.append(output.last_hidden_state)
        cache.after_forward()
        start = end
    assert output is not None
    if len(hidden) > 1:
        output.last_hidden_state = torch.cat(hidden, 1)
    return output


def coordinates(position_ids: Tensor | None) -> Int[Tensor, "3 batch tokens"] | None:
    """Time, height and width of each token, where the model has them; a row of text positions before them is dropped.

    `generate()` hands over one row for all three when it continues a conversation.
    """
    return None if position_ids is None or position_ids.dim() != 3 else position_ids[-3:].expand(3, -1, -1)


def _cut(
    kwargs: dict[str, Any], cache: EvictingCache, start: int, end: int, visual: Bool[Tensor, "batch tokens"]
) -> dict[str, Any]:
    """Keyword arguments of the decoder for tokens [start, end)."""
    part, tokens = dict(kwargs), visual.shape[1]
    for name, value in kwargs.items():
        if value is None:
            continue
        if name in _SLICED:
            part[name] = value.narrow(_SLICED[name], start, end - start)
        elif name == "deepstack_visual_embeds":
            part[name] = _rows(value, kwargs["visual_pos_masks"], start, end)
        elif name == "attention_mask":
            part[name] = _cut_mask(value, cache, start, end, tokens)
        elif torch.is_tensor(value):
            raise ValueError(
                f"chunked prefill cannot cut the argument {name!r} of this model; set prefill_chunk to null"
            )
    return part


def _rows(levels: list[Tensor], visual: Bool[Tensor, "batch tokens"], start: int, end: int) -> list[Tensor]:
    """Of features of all visual tokens, row by row, those of tokens [start, end)."""
    numbers = (visual.flatten().long().cumsum(0) - 1).view(visual.shape)
    chosen = numbers[:, start:end][visual[:, start:end]]
    return [level[chosen] for level in levels]


def _cut_mask(mask: Any, cache: EvictingCache, start: int, end: int, tokens: int) -> Any:
    """Rows and columns of a mask; one that the model built already, by kind of layer, ends where the chunk ends."""
    if not isinstance(mask, dict):
        return mask[:, : mask.shape[1] - tokens + end]
    cut = {}
    for kind, whole in mask.items():
        cut[kind] = whole
        if whole is not None:
            last = whole.shape[-1] - tokens + end
            sliding = kind == "sliding_attention"
            first = next(i for i, layer in enumerate(cache.layers) if getattr(layer, "is_sliding", False) == sliding)
            held = cache.get_mask_sizes(end - start, first)[0]
            cut[kind] = whole[:, :, start:end, last - held : last]
    return cut
