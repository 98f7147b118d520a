"""How much some queries heed each key, at most or in sum: what is read off a second pass, in blocks of queries."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from retention.ops.blocks import BLOCK
from retention.ops.logits import grouped_logits
from retention.ops.observe import attention_rows


def naive_heeded(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch kv_heads queries keys"],
    asking: Bool[Tensor, "batch queries"],
    scaling: float,
    *,
    sizes: Float[Tensor, "batch heads keys"] | None = None,
    streams: Float[Tensor, "batch queries"] | None = None,
    summed: bool = False,
) -> Float[Tensor, "batch kv_heads keys"]:
    """Largest attention over the asking queries and the query group, or its sum; 0 where no query asks.

    The softmax runs over the visible keys alone. `sizes` of a key in a query head multiply, `streams` of a query
    divide (KVzip, arXiv 2505.23416, and its variant with `||W_O v|| / ||x||`).
    """
    rows = attention_rows(queries, keys, visible, scaling) * asking[:, None, None, :, None]
    if sizes is not None:
        rows = rows * rearrange(sizes, "b (h g) k -> b h g 1 k", h=keys.shape[1])
    if streams is not None:
        rows = rows / streams[:, None, None, :, None].clamp(min=1e-20)
    return rows.sum((2, 3)) if summed else rows.amax((2, 3))


def heeded(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch kv_heads queries keys"],
    asking: Bool[Tensor, "batch queries"],
    scaling: float,
    *,
    sizes: Float[Tensor, "batch heads keys"] | None = None,
    streams: Float[Tensor, "batch queries"] | None = None,
    summed: bool = False,
) -> Float[Tensor, "batch kv_heads keys"]:
    """The same in blocks of the columns where any row asks: memory linear in the number of keys.

    The largest is taken of logarithms, so that a block's map is neither normalised nor weighted as a whole.
    """
    found = torch.zeros(keys.shape[:3], device=keys.device)
    columns = torch.nonzero(asking.any(0)).flatten()
    for own in columns.split(BLOCK) if len(columns) else ():
        part = (queries[:, :, own], keys, visible[:, :, own], asking[:, own], scaling)
        row_sizes = None if streams is None else streams[:, own]
        if summed:
            found = found + naive_heeded(*part, sizes=sizes, streams=row_sizes, summed=True)
        else:
            found = torch.maximum(found, _largest(*part, sizes, row_sizes))
    return found


def _largest(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch kv_heads queries keys"],
    asking: Bool[Tensor, "batch queries"],
    scaling: float,
    sizes: Float[Tensor, "batch heads keys"] | None,
    streams: Float[Tensor, "batch queries"] | None,
) -> Float[Tensor, "batch kv_heads keys"]:
    logits = grouped_logits(queries, keys, scaling).masked_fill_(~visible[:, :, None], float("-inf"))
    less = logits.logsumexp(-1, keepdim=True)
    if streams is not None:
        less = less + streams[:, None, None, :, None].clamp(min=1e-20).log()
    logits -= less.masked_fill(~asking[:, None, None, :, None] | less.isneginf(), float("inf"))
    peaks = logits.amax(3)
    if sizes is not None:
        peaks = peaks + rearrange(sizes, "b (h g) k -> b h g k", h=keys.shape[1]).log()
    return peaks.amax(2).exp()
