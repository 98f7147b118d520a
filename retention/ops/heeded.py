"""How much some queries heed each key, at most or in sum: what is read off a second pass, in blocks of queries."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from retention.ops.observe import BLOCK, attention_rows


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
    """The same in blocks of the columns where any row asks: memory linear in the number of keys."""
    found = torch.zeros(keys.shape[:3], device=keys.device)
    columns = torch.nonzero(asking.any(0)).flatten()
    for own in columns.split(BLOCK) if len(columns) else ():
        block = naive_heeded(
            queries[:, :, own],
            keys,
            visible[:, :, own],
            asking[:, own],
            scaling,
            sizes=sizes,
            streams=None if streams is None else streams[:, own],
            summed=summed,
        )
        found = found + block if summed else torch.maximum(found, block)
    return found
