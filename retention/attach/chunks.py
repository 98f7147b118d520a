"""Run a long prompt through the decoder chunk by chunk, evicting in between."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from retention.cache.config import CacheConfig
from retention.cache.evicting import EvictingCache

_SLICED = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1}


def chunk_ends(config: CacheConfig, visual: Bool[Tensor, "batch tokens"], tokens: int) -> list[int]:
    """Where chunks end: every `prefill_chunk` tokens, after every image, or once at the end."""
    if config.chunk_by_image:
        inside, after = visual[:, :-1], visual[:, 1:]
        ends = (torch.nonzero((inside & ~after).any(0)).flatten() + 1).tolist()
        return [*(end for end in ends if end < tokens), tokens]
    if config.prefill_chunk is None:
        return [tokens]
    return [*range(config.prefill_chunk, tokens, config.prefill_chunk), tokens]


def run_chunks(
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cache: EvictingCache,
    ends: list[int],
    valid: Bool[Tensor, "batch tokens"],
    visual: Bool[Tensor, "batch tokens"],
) -> Any:
    """Call the decoder once per chunk; the result reads as one call's.

    Raises:
        ValueError: when an argument cannot be cut into chunks.
    """
    tokens, padded = valid.shape[1], kwargs.get("attention_mask") is not None
    hidden, start, output = [], 0, None
    for end in ends:
        part = kwargs if len(ends) == 1 else _cut(kwargs, start, end, tokens)
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


def _cut(kwargs: dict[str, Any], start: int, end: int, tokens: int) -> dict[str, Any]:
    """Keyword arguments of the decoder for tokens [start, end)."""
    part = dict(kwargs)
    for name, value in kwargs.items():
        if name in _SLICED and value is not None:
            length = end - start
            part[name] = value.narrow(_SLICED[name], start, length)
        elif name == "attention_mask" and value is not None:
            part[name] = value[:, : value.shape[1] - tokens + end]
        elif torch.is_tensor(value):
            raise ValueError(
                f"chunked prefill cannot cut the argument {name!r} of this model; set prefill_chunk to null"
            )
    return part
